/* A machine on which something goes wrong: loaded before odmr (LD_PRELOAD=build/fail.so), or linked into it with
 * -Wl,--wrap, as a sanitizer needs it, it makes one call of one function fail.
 *
 *   FAIL=openat FAIL_AT=3 FAIL_ERRNO=EMFILE    the third openat() fails so; FAIL=any counts all but memory together
 *   FAIL_ERRNO=KILL      instead of failing, the process is killed right before the call
 *   FAIL_FROM=accept4    nothing is counted before the first accept4()
 *   FAIL_LOG=FILE        where it says "fired" when it has done so, and, as the process ends, how often each
 *                        function was called
 *
 * Octets that leave through stdio fail as they do on a full disk: the file's descriptor leads to /dev/full for
 * the length of the call, whatever FAIL_ERRNO says. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <poll.h>
#include <unistd.h>

struct calls {
    const char *name;
    bool memory;
    atomic_ulong count;
} __attribute__((aligned(32))); /* so that they lie side by side, whatever the compiler likes */

/* The linker collects them, and names both ends. */
#define COUNTED __attribute__((section("calls"), used))
extern struct calls __start_calls[], __stop_calls[];

static const struct {
    const char *name;
    int number;
} errors[] = {{"ENOMEM", ENOMEM}, {"ENOSPC", ENOSPC}, {"EIO", EIO},     {"EMFILE", EMFILE},
              {"EAGAIN", EAGAIN}, {"EINTR", EINTR},   {"ENOLCK", ENOLCK}, {"EPIPE", EPIPE},
              {"ECONNRESET", ECONNRESET}, {"EAFNOSUPPORT", EAFNOSUPPORT}, {"KILL", 0}};

static struct {
    const char *name, *from;
    unsigned long at;
    int error, log;
    bool any;
    atomic_bool armed;
    atomic_ulong count; /* of all but memory */
} wanted = {.log = -1};

static void say(const char *text)
{
    ssize_t n = write(wanted.log, text, strlen(text));
    (void)n;
}

/* What children would inherit goes away. */
static const char *take(const char *variable)
{
    const char *value = getenv(variable);
    static char kept[8][256];
    static int used;
    if (!value || used == 8)
        return NULL;
    snprintf(kept[used], sizeof kept[0], "%s", value);
    unsetenv(variable);
    return kept[used++];
}

__attribute__((constructor)) static void begin(void)
{
    const char *name = take("FAIL"), *at = take("FAIL_AT"), *error = take("FAIL_ERRNO"), *log = take("FAIL_LOG");
    wanted.from = take("FAIL_FROM");
    wanted.at = at ? strtoul(at, NULL, 10) : 0;
    wanted.error = -1;
    for (size_t i = 0; error && i < sizeof errors / sizeof *errors; i++)
        if (strcmp(errors[i].name, error) == 0)
            wanted.error = errors[i].number;
    if (log)
        wanted.log = open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    unsetenv("LD_PRELOAD");
    wanted.any = name && strcmp(name, "any") == 0;
    wanted.name = name; /* last: from here on calls count */
    wanted.armed = !wanted.from;
    if (name && (wanted.error < 0 || wanted.log < 0)) {
        fputs("fail: FAIL needs FAIL_ERRNO, one that it knows, and FAIL_LOG\n", stderr);
        _exit(64);
    }
}

__attribute__((destructor)) static void end(void)
{
    char line[128];
    for (struct calls *c = __start_calls; c < __stop_calls; c++) {
        snprintf(line, sizeof line, "%s %lu\n", c->name, (unsigned long)c->count);
        if (wanted.name && c->count > 0)
            say(line);
    }
    snprintf(line, sizeof line, "any %lu\n", (unsigned long)wanted.count);
    if (wanted.name)
        say(line);
}

/* Counts this call; true: it is the one that fails. */
static bool due(struct calls *c)
{
    unsigned long n, all;
    if (!wanted.name)
        return false;
    if (!wanted.armed && strcmp(wanted.from, c->name) == 0)
        wanted.armed = true;
    if (!wanted.armed)
        return false;
    n = atomic_fetch_add(&c->count, 1) + 1;
    all = c->memory ? 0 : atomic_fetch_add(&wanted.count, 1) + 1;
    if ((wanted.any ? all : n) != wanted.at || !(wanted.any || strcmp(wanted.name, c->name) == 0))
        return false;
    say("fired\n");
    if (wanted.error == 0)
        kill(getpid(), SIGKILL);
    errno = wanted.error;
    return true;
}

#ifdef WRAPPED /* ld's --wrap renames: ours is __wrap_NAME, the one of the library __real_NAME */
#define OURS(f) __wrap_##f
#define REAL(f) extern __typeof__(f) __real_##f
#define THE(f) __real_##f
#else
#define OURS(f) f
#define REAL(f) extern __typeof__(f) f
#define THE(f) ((__typeof__(&f))dlsym(RTLD_NEXT, #f))
#endif

#define FAILING(type, f, parameters, arguments, failed)                     \
    COUNTED static struct calls calls_##f = {.name = #f};                   \
    REAL(f);                                                                \
    type OURS(f) parameters;                                                \
    type OURS(f) parameters                                                 \
    {                                                                       \
        return due(&calls_##f) ? failed : THE(f) arguments;                 \
    }

FAILING(char *, strdup, (const char *text), (text), NULL)
FAILING(FILE *, fdopen, (int fd, const char *mode), (fd, mode), NULL)
FAILING(DIR *, fdopendir, (int fd), (fd), NULL)
FAILING(struct dirent *, readdir, (DIR *dir), (dir), NULL)
FAILING(int, mkostemp, (char *path, int flags), (path, flags), -1)
FAILING(int, fsync, (int fd), (fd), -1)
FAILING(int, renameat, (int a, const char *from, int b, const char *to), (a, from, b, to), -1)
FAILING(int, mkdirat, (int dir, const char *path, mode_t mode), (dir, path, mode), -1)
FAILING(int, unlinkat, (int dir, const char *path, int flags), (dir, path, flags), -1)
FAILING(int, flock, (int fd, int what), (fd, what), -1)
FAILING(ssize_t, pread, (int fd, void *data, size_t size, off_t at), (fd, data, size, at), -1)
FAILING(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at), -1)
FAILING(int, fstat, (int fd, struct stat *st), (fd, st), -1)
FAILING(int, fstatat, (int dir, const char *path, struct stat *st, int flags), (dir, path, st, flags), -1)
FAILING(int, futimens, (int fd, const struct timespec times[2]), (fd, times), -1)
FAILING(int, accept4, (int fd, struct sockaddr *a, socklen_t *len, int flags), (fd, a, len, flags), -1)
FAILING(int, socket, (int domain, int type, int protocol), (domain, type, protocol), -1)
FAILING(int, connect, (int fd, const struct sockaddr *a, socklen_t len), (fd, a, len), -1)
FAILING(int, poll, (struct pollfd *p, nfds_t n, int timeout), (p, n, timeout), -1)
FAILING(ssize_t, recv, (int fd, void *data, size_t size, int flags), (fd, data, size, flags), -1)
FAILING(ssize_t, send, (int fd, const void *data, size_t size, int flags), (fd, data, size, flags), -1)
FAILING(int, pthread_create, (pthread_t *t, const pthread_attr_t *a, void *(*run)(void *), void *argument),
        (t, a, run, argument), wanted.error)
FAILING(int, posix_spawnp, (pid_t *pid, const char *file, const posix_spawn_file_actions_t *actions,
        const posix_spawnattr_t *attributes, char *const argv[], char *const environment[]),
        (pid, file, actions, attributes, argv, environment), wanted.error)

/* ---- With a mode behind, when a file is made ---- */

COUNTED static struct calls calls_openat = {.name = "openat"};
REAL(openat);
int OURS(openat)(int dir, const char *path, int flags, ...);
int OURS(openat)(int dir, const char *path, int flags, ...)
{
    mode_t mode = 0;
    va_list more;
    va_start(more, flags);
    if (flags & O_CREAT)
        mode = va_arg(more, mode_t);
    va_end(more);
    return due(&calls_openat) ? -1 : THE(openat)(dir, path, flags, mode);
}

/* ---- Octets through stdio ---- */

/* The file's descriptor leads to a full disk, until the one that is returned is put back. */
static int fill_disk(FILE *file)
{
    int fd = fileno(file), kept = fcntl(fd, F_DUPFD_CLOEXEC, 0), full = open("/dev/full", O_WRONLY | O_CLOEXEC);
    dup2(full, fd);
    close(full);
    return kept;
}

static void free_disk(FILE *file, int kept)
{
    int error = errno;
    dup2(kept, fileno(file));
    fcntl(fileno(file), F_SETFD, FD_CLOEXEC);
    close(kept);
    errno = error;
}

COUNTED static struct calls calls_fflush = {.name = "fflush"};
REAL(fflush);
int OURS(fflush)(FILE *file);
int OURS(fflush)(FILE *file)
{
    int kept, result;
    if (!file || fileno(file) < 0 || !due(&calls_fflush))
        return THE(fflush)(file);
    kept = fill_disk(file);
    result = THE(fflush)(file);
    free_disk(file, kept);
    return result;
}

COUNTED static struct calls calls_fwrite = {.name = "fwrite"};
REAL(fwrite);
size_t OURS(fwrite)(const void *data, size_t size, size_t n, FILE *file);
size_t OURS(fwrite)(const void *data, size_t size, size_t n, FILE *file)
{
    int kept;
    if (fileno(file) < 0 || !due(&calls_fwrite))
        return THE(fwrite)(data, size, n, file);
    kept = fill_disk(file);
    n = THE(fwrite)(data, size, n, file);
    n = THE(fflush)(file) == 0 ? n : 0;
    free_disk(file, kept);
    return n;
}

COUNTED static struct calls calls_fclose = {.name = "fclose"};
REAL(fclose);
int OURS(fclose)(FILE *file);
int OURS(fclose)(FILE *file)
{
    bool fails = due(&calls_fclose);
    int result = THE(fclose)(file);
    errno = fails ? wanted.error : errno;
    return fails ? EOF : result;
}

/* ---- Memory: OpenSSL's too, when preloaded. dlsym() itself may need some, so glibc is asked by other names ---- */

#ifndef WRAPPED
#undef THE
#define THE(f) __libc_##f
#endif
extern void *THE(malloc)(size_t size), *THE(calloc)(size_t n, size_t size), *THE(realloc)(void *old, size_t size);

COUNTED static struct calls calls_malloc = {.name = "malloc", .memory = true};
void *OURS(malloc)(size_t size);
void *OURS(malloc)(size_t size)
{
    return due(&calls_malloc) ? NULL : THE(malloc)(size);
}

COUNTED static struct calls calls_calloc = {.name = "calloc", .memory = true};
void *OURS(calloc)(size_t n, size_t size);
void *OURS(calloc)(size_t n, size_t size)
{
    return due(&calls_calloc) ? NULL : THE(calloc)(n, size);
}

COUNTED static struct calls calls_realloc = {.name = "realloc", .memory = true};
void *OURS(realloc)(void *old, size_t size);
void *OURS(realloc)(void *old, size_t size)
{
    return due(&calls_realloc) ? NULL : THE(realloc)(old, size);
}
