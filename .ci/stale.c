/* A network file system as another host sees it: loaded before odmr (LD_PRELOAD=build/stale.so).
 *
 *   STALE=attributes   fstatat() by a path with a slash says what openat() of that path saw before, as NFS does while
 *                      its cache is warm; flock() waits up to 20 ms, so that another session may be faster meanwhile
 *   STALE=overtaken    the same, but flock() waits until another session has removed the file, 10 s at most
 *   STALE=estale       a file that has been removed answers fstat() with ESTALE, and flock() with ENOENT
 *   STALE=gone         each file of a message answers openat() with ENOTCONN: the mount is gone */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>

enum { SEEN_MAX = 4096 };

static struct {
    char path[256];
    struct stat st;
} seen[SEEN_MAX];
static size_t seen_count;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define REAL(f) ((__typeof__(&f))dlsym(RTLD_NEXT, #f))

static bool mode(const char *name)
{
    const char *stale = getenv("STALE");
    return stale && strcmp(stale, name) == 0;
}

/* DOMAIN/BOX/NAME */
static bool is_message(const char *path)
{
    const char *slash = strchr(path, '/');
    return slash && strchr(slash + 1, '/');
}

static size_t find(const char *path)
{
    size_t i = 0;
    while (i < seen_count && strcmp(seen[i].path, path) != 0)
        i++;
    return i;
}

int openat(int dir, const char *path, int flags, ...)
{
    mode_t permissions = 0;
    va_list more;
    int fd;
    va_start(more, flags);
    if (flags & O_CREAT)
        permissions = va_arg(more, mode_t);
    va_end(more);
    if (mode("gone") && is_message(path)) {
        errno = ENOTCONN;
        return -1;
    }
    fd = REAL(openat)(dir, path, flags, permissions);
    if (fd >= 0 && is_message(path)) {
        size_t i;
        pthread_mutex_lock(&lock);
        i = find(path);
        if (i < SEEN_MAX && strlen(path) < sizeof seen[i].path && REAL(fstat)(fd, &seen[i].st) == 0) {
            strcpy(seen[i].path, path);
            seen_count += i == seen_count;
        }
        pthread_mutex_unlock(&lock);
    }
    return fd;
}

int fstatat(int dir, const char *path, struct stat *st, int flags)
{
    size_t i = SEEN_MAX;
    if ((mode("attributes") || mode("overtaken")) && is_message(path)) {
        pthread_mutex_lock(&lock);
        i = find(path);
        if (i < seen_count)
            *st = seen[i].st;
        i = i < seen_count ? i : SEEN_MAX;
        pthread_mutex_unlock(&lock);
    }
    return i < SEEN_MAX ? 0 : REAL(fstatat)(dir, path, st, flags);
}

static bool removed(int fd)
{
    struct stat st;
    return REAL(fstat)(fd, &st) == 0 && S_ISREG(st.st_mode) && st.st_nlink == 0;
}

int fstat(int fd, struct stat *st)
{
    if (mode("estale") && removed(fd)) {
        errno = ESTALE;
        return -1;
    }
    return REAL(fstat)(fd, st);
}

int flock(int fd, int operation)
{
    if (mode("attributes") || mode("estale"))
        poll(NULL, 0, rand() % 20);
    for (int i = 0; mode("overtaken") && !removed(fd) && i < 1000; i++)
        poll(NULL, 0, 10);
    if (mode("estale") && removed(fd)) {
        errno = ENOENT;
        return -1;
    }
    return REAL(flock)(fd, operation);
}
