/* The world in which the fuzz targets run odmr.c: a peer, a disk, a clock, a TLS library, all of them in memory
 * and the same at each execution, so that a finding comes again and a hundred thousand of them fit into a few
 * seconds. Everything here stands in for a call of the system or of OpenSSL, by a macro of the same name, defined
 * before odmr.c is included; odmr.c itself knows nothing of it.
 *
 *   the peer   says what the fuzzer wants. Some octets that occur in no UTF-8 are its stage directions: see
 *              peer_says(). What we say is kept in said[], and a target may look at it whenever something leaves.
 *   the disk   is a table of files with a path each; directories need not be made. It knows what is on disk and
 *              what was only written, and it can fail, once, at the n-th call.
 *   the clock  goes on only while somebody waits for a peer that is silent.
 *   TLS        lets every octet through as it is; its handshake is one octet, T. So what stands above it (PLAIN,
 *              EXTERNAL, channel binding, STARTTLS's forgetting) can be reached.
 *   chance     is 0, 1, 2 and so on; PBKDF2 is one HMAC. Seeds can be computed with that. */

#include "../odmr.h"

#include <arpa/inet.h>
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <grp.h>
#include <limits.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <openssl/crypto.h>
#include <openssl/err.h>
#include <openssl/hmac.h>
#include <openssl/rand.h>
#include <openssl/x509v3.h>
#include <poll.h>
#include <pwd.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <sysexits.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

/* Limits that a few hundred octets of input can reach, and buffers that a short message fills. */
#undef COPY_SIZE
#define COPY_SIZE 128
#undef WIRE_PART
#define WIRE_PART 16
#undef MESSAGE_TOP
#define MESSAGE_TOP 300
#undef ENDLESS_LINE
#define ENDLESS_LINE 50000
#undef REPLIES_IN_FLIGHT
#define REPLIES_IN_FLIGHT 20
#undef RECIPIENTS_A_TRANSACTION
#define RECIPIENTS_A_TRANSACTION 8
#undef RECIPIENTS_MAX
#define RECIPIENTS_MAX 6
#undef DOMAINS_A_MESSAGE
#define DOMAINS_A_MESSAGE 3
#undef TRACE_FIELDS_MAX
#define TRACE_FIELDS_MAX 4
#undef BAD_COMMANDS_SERVER
#define BAD_COMMANDS_SERVER 8
#undef PASSING_MAX
#define PASSING_MAX 12

/* Coverage is odmr.c's: what stands here and in the targets guides nobody. */
#pragma clang attribute push(__attribute__((no_sanitize("coverage"))), apply_to = function)

/* What a target asserts. libFuzzer takes the abort() for a finding and keeps the input. */
#define must(what) ((what) ? (void)0 : broken_promise(#what, __LINE__))

static void broken_promise(const char *what, int line)
{
    dprintf(STDERR_FILENO, "==== line %d: it is not true that %s\n", line, what);
    abort();
}

static struct session the_session;
static struct provider the_provider;

static bool starts_with(const char *text, size_t len, const char *start)
{
    return len >= strlen(start) && memcmp(text, start, strlen(start)) == 0;
}

/* ---- The clock and chance ---- */

#define START_OF_TIME 1700000000

static int64_t clock_ms;
static unsigned char chance;

static int world_clock(struct timespec *t)
{
    *t = (struct timespec){.tv_sec = START_OF_TIME + clock_ms / 1000, .tv_nsec = clock_ms % 1000 * 1000000};
    return 0;
}

static int world_random(unsigned char *out, int len)
{
    while (len-- > 0)
        *out++ = chance++;
    return 1;
}

/* ---- The peer ---- */

enum { PEER_FD = 10, WAKE_FD, QUEUE_FD, HANDLES_FROM = 100 };
enum { PEER_MAX = 128 << 10, SAID_MAX = 1 << 20, EVENTS_MAX = 64, REPEAT = 1000 };
enum { MORE_OF_IT = 0xfb, SHUTDOWN, SILENCE, PAUSE };

static char peer[PEER_MAX];     /* what it says, without the stage directions */
static size_t peer_len, peer_at;
static struct {
    size_t at; /* before this octet */
    int what;
} directions[EVENTS_MAX];
static size_t event_count, event_at;
static size_t piece; /* most octets that one recv() or send() moves; 0: as many as fit */
static bool shutting_down;

static char said[SAID_MAX];
static size_t said_len;
static void (*when_said)(void);

/* Stage directions: PAUSE, nothing more until we wait; SILENCE, nothing until our patience is over; SHUTDOWN, the
 * provider is told to stop; MORE_OF_IT, the octet before it a thousand times more. */
static void peer_says(const uint8_t *data, size_t len)
{
    peer_len = peer_at = event_count = event_at = 0;
    for (size_t i = 0; i < len; i++) {
        if (data[i] < MORE_OF_IT || data[i] > PAUSE) {
            if (peer_len < PEER_MAX)
                peer[peer_len++] = (char)data[i];
        } else if (data[i] == MORE_OF_IT) {
            size_t more = PEER_MAX - peer_len < REPEAT ? PEER_MAX - peer_len : REPEAT;
            if (peer_len == 0 || peer[peer_len - 1] == '\n')
                continue; /* a thousand lines would only take time */
            memset(peer + peer_len, peer[peer_len - 1], more);
            peer_len += more;
        } else if (event_count < EVENTS_MAX) {
            directions[event_count].at = peer_len;
            directions[event_count++].what = data[i];
        }
    }
}

static bool event_now(void)
{
    return event_at < event_count && directions[event_at].at == peer_at;
}

/* Whether the peer has something for us (its end counts), or has within so many milliseconds. */
static int wait_for_peer(struct pollfd *p, nfds_t n, int patience)
{
    while (event_now()) {
        if (patience == 0)
            return 0;
        switch (directions[event_at++].what) {
        case SILENCE:
            clock_ms += patience;
            return 0;
        case SHUTDOWN:
            shutting_down = true;
            atomic_store(&the_provider.stopping, true);
            if (n == 2 && p[1].fd == WAKE_FD) {
                p[1].revents = POLLIN;
                return 1;
            }
        }
    }
    p[0].revents = POLLIN;
    return 1;
}

static int world_poll(struct pollfd *p, nfds_t n, int patience)
{
    for (nfds_t i = 0; i < n; i++)
        p[i].revents = 0;
    if (n > 0 && p[0].fd == PEER_FD && p[0].events == POLLIN)
        return wait_for_peer(p, n, patience);
    if (n > 0 && p[0].fd == PEER_FD) {
        p[0].revents = p[0].events;
        return 1;
    }
    clock_ms += patience; /* a pause, unless the server is to stop */
    return shutting_down;
}

static ssize_t world_recv(int fd, void *data, size_t size, int flags)
{
    size_t n = event_at < event_count ? directions[event_at].at - peer_at : peer_len - peer_at;
    must(fd == PEER_FD);
    if (event_now() && (flags & MSG_DONTWAIT)) {
        errno = EAGAIN;
        return -1;
    }
    must(!event_now()); /* nobody blocks in here: to wait is poll()'s affair */
    n = n < size ? n : size;
    n = piece && piece < n ? piece : n;
    memcpy(data, peer + peer_at, n);
    peer_at += n;
    return (ssize_t)n;
}

static ssize_t world_send(int fd, const void *data, size_t size)
{
    must(fd == PEER_FD);
    size = piece && piece < size ? piece : size;
    if (SAID_MAX - said_len < size) {
        errno = EPIPE;
        return -1;
    }
    memcpy(said + said_len, data, size);
    said_len += size;
    if (when_said)
        when_said();
    return (ssize_t)size;
}

/* What of the peer's octets odmr.c has taken out of its buffer, too. */
static size_t peer_understood(void)
{
    return peer_at - (the_session.io.in_end - the_session.io.in_at);
}

/* ---- The disk ---- */

enum { FILES_MAX = 64, HANDLES_MAX = 64, FILE_ROOM = 128 << 10 };

static struct file {
    char path[600]; /* "": a scratch file without a name */
    bool there;     /* the path leads to it */
    bool fixed;     /* one of ours, not to be written to */
    bool synced, durable; /* what was written is on disk; and so is the directory that says where it is */
    const char *data;
    size_t len;
} files[FILES_MAX];
static char disk_space[FILES_MAX][FILE_ROOM];
static size_t file_count;

static struct handle {
    bool open;
    struct file *file; /* NULL: a directory */
    size_t at;
    char path[600];
    FILE *stream;
    struct dirent entry;
} handles[HANDLES_MAX];
static size_t handles_open;

static size_t last_claim;     /* how much of the peer was understood when a message was claimed before the reversal */
static unsigned fails_at;     /* this call, counted down, fails */
static bool disk_failed;
static size_t read_piece;     /* most octets that one pread() gives; 0: as many as fit */

static bool fails(int why)
{
    if (fails_at == 0 || --fails_at > 0)
        return false;
    errno = why;
    return disk_failed = true;
}

/* Every path that odmr.c makes is a domain's in lower case, and goes no way up. */
static void check_path(const char *path)
{
    size_t domain = strspn(path, "abcdefghijklmnopqrstuvwxyz0123456789-.");
    must(path[0] != '/' && path[0] != '.');
    must(path[domain] == '/' || path[domain] == '\0');
    must(strncmp(path, "../", 3) != 0 && !strstr(path, "/../"));
    must(strlen(path) < sizeof files[0].path);
}

static struct file *file_named(const char *path)
{
    for (size_t i = 0; i < file_count; i++)
        if (files[i].there && strcmp(files[i].path, path) == 0)
            return &files[i];
    return NULL;
}

static struct file *new_file(const char *path)
{
    struct file *f = &files[file_count];
    if (file_count == FILES_MAX) {
        errno = ENOSPC;
        return NULL;
    }
    memset(f, 0, sizeof *f);
    f->data = disk_space[file_count++];
    f->there = path[0] != '\0';
    snprintf(f->path, sizeof f->path, "%s", path);
    return f;
}

/* A file of the target's own, on disk before the execution starts. */
static struct file *put_file(const char *path, const char *data, size_t len)
{
    struct file *f = new_file(path);
    f->fixed = f->synced = f->durable = true;
    f->data = data;
    f->len = len;
    return f;
}

static struct handle *handle_of(int fd)
{
    must(fd >= HANDLES_FROM && fd < HANDLES_FROM + HANDLES_MAX && handles[fd - HANDLES_FROM].open);
    return &handles[fd - HANDLES_FROM];
}

static int new_handle(struct file *f, const char *path)
{
    int i = 0;
    while (i < HANDLES_MAX && handles[i].open)
        i++;
    if (i == HANDLES_MAX) {
        errno = EMFILE;
        return -1;
    }
    handles[i].open = true;
    handles[i].file = f;
    handles[i].at = 0;
    handles[i].stream = NULL;
    snprintf(handles[i].path, sizeof handles[i].path, "%s", path);
    handles_open++;
    return HANDLES_FROM + i;
}

static int world_close(int fd)
{
    if (fd == PEER_FD)
        return 0;
    handle_of(fd)->open = false;
    handles_open--;
    return 0;
}

/* A name in a directory, as a whole path. */
static const char *whole_path(int dir, const char *name)
{
    static char path[1200];
    if (dir == QUEUE_FD)
        return name;
    snprintf(path, sizeof path, "%s/%s", handle_of(dir)->path, name);
    return path;
}

static bool directory_there(const char *path)
{
    size_t n = strlen(path);
    for (size_t i = 0; i < file_count; i++)
        if (files[i].there && strncmp(files[i].path, path, n) == 0 && files[i].path[n] == '/')
            return true;
    return false;
}

static int world_openat(int dir, const char *name, int flags)
{
    struct file *f;
    must(dir == QUEUE_FD);
    if (strcmp(name, ".") == 0)
        return new_handle(NULL, "");
    check_path(name);
    if (fails(EIO))
        return -1;
    if (flags & O_DIRECTORY) {
        errno = ENOENT;
        return directory_there(name) ? new_handle(NULL, name) : -1;
    }
    must(flags & O_NOFOLLOW);
    f = file_named(name);
    errno = f ? EEXIST : ENOENT;
    if (f ? (flags & O_CREAT) && (flags & O_EXCL) : !(flags & O_CREAT))
        return -1;
    if (!f && !(f = new_file(name)))
        return -1;
    if (flags & O_TRUNC)
        f->len = 0;
    return new_handle(f, name);
}

static ssize_t world_pread(int fd, void *data, size_t size, off_t at)
{
    struct file *f = handle_of(fd)->file;
    size_t n = (size_t)at < f->len ? f->len - (size_t)at : 0;
    must(at >= 0);
    if (fails(EIO))
        return -1;
    n = n < size ? n : size;
    n = read_piece && read_piece < n ? read_piece : n;
    memcpy(data, f->data + at, n);
    return (ssize_t)n;
}

/* The only octet that is ever written into a message of the queue: it strikes out a recipient. */
static ssize_t world_pwrite(int fd, const void *data, size_t size, off_t at)
{
    struct file *f = handle_of(fd)->file;
    char *space = disk_space[f - files];
    must(size == 1 && *(const char *)data == '=' && (size_t)at < f->len && (f->data[at] == '@' || f->data[at] == '='));
    if (fails(EIO))
        return -1;
    if (f->data != space)
        f->data = memcpy(space, f->data, f->len);
    space[at] = '=';
    f->synced = false;
    return 1;
}

static int world_fstat(const struct file *f, struct stat *st)
{
    errno = ENOENT;
    if (!f)
        return -1;
    memset(st, 0, sizeof *st);
    st->st_mode = S_IFREG | 0600;
    st->st_nlink = 1;
    st->st_size = (off_t)f->len;
    st->st_ino = (ino_t)(f - files) + 1;
    st->st_mtim.tv_sec = st->st_atim.tv_sec = START_OF_TIME - 100;
    return 0;
}

static int world_flock(int fd)
{
    must(handle_of(fd)->file);
    if (the_session.state == AUTHENTICATED)
        last_claim = peer_understood();
    return fails(EWOULDBLOCK) ? -1 : 0;
}

static int world_rename(const char *from, const char *to)
{
    struct file *f = file_named(from), *old = file_named(to);
    check_path(to);
    errno = ENOENT;
    if (!f || fails(EIO))
        return -1;
    if (old)
        old->there = false;
    snprintf(f->path, sizeof f->path, "%s", to);
    f->durable = false;
    return 0;
}

static int world_unlink(const char *path)
{
    struct file *f = file_named(path);
    errno = ENOENT;
    if (!f || fails(EIO))
        return -1;
    f->there = false;
    return 0;
}

/* A file's own fsync() makes its content safe; its directory's makes it findable after a crash. */
static int world_fsync(int fd)
{
    struct handle *h = handle_of(fd);
    size_t n = strlen(h->path);
    if (fails(EIO))
        return -1;
    if (h->file)
        h->file->synced = true;
    for (size_t i = 0; !h->file && i < file_count; i++)
        if (strncmp(files[i].path, h->path, n) == 0 && files[i].path[n] == '/' && !strchr(files[i].path + n + 1, '/'))
            files[i].durable = files[i].synced;
    return 0;
}

/* Streams over the files. */
static ssize_t cookie_read(void *cookie, char *data, size_t size)
{
    struct handle *h = cookie;
    ssize_t n = world_pread(HANDLES_FROM + (int)(h - handles), data, size, (off_t)h->at);
    h->at += n > 0 ? (size_t)n : 0;
    return n;
}

static ssize_t cookie_write(void *cookie, const char *data, size_t size)
{
    struct handle *h = cookie;
    struct file *f = h->file;
    must(!f->fixed);
    if (h->at > FILE_ROOM || size > FILE_ROOM - h->at || fails(ENOSPC)) {
        errno = ENOSPC;
        return 0; /* so fopencookie() wants an error */
    }
    if (h->at > f->len)
        memset(disk_space[f - files] + f->len, 0, h->at - f->len);
    memcpy(disk_space[f - files] + h->at, data, size);
    h->at += size;
    f->len = h->at > f->len ? h->at : f->len;
    f->synced = false;
    return (ssize_t)size;
}

static int cookie_seek(void *cookie, off64_t *to, int whence)
{
    struct handle *h = cookie;
    off64_t from = whence == SEEK_SET ? 0 : (off64_t)(whence == SEEK_CUR ? h->at : h->file->len);
    if (from + *to < 0 || from + *to > FILE_ROOM)
        return -1;
    h->at = (size_t)(*to += from);
    return 0;
}

static int cookie_close(void *cookie)
{
    return world_close(HANDLES_FROM + (int)((struct handle *)cookie - handles));
}

static FILE *world_fdopen(int fd, const char *mode)
{
    struct handle *h = handle_of(fd);
    h->stream = fopencookie(h, mode, (cookie_io_functions_t){cookie_read, cookie_write, cookie_seek, cookie_close});
    return h->stream;
}

static int world_fileno(FILE *stream)
{
    for (int i = 0; i < HANDLES_MAX; i++)
        if (handles[i].open && handles[i].stream == stream)
            return HANDLES_FROM + i;
    return -1;
}

static int world_mkostemp(void)
{
    struct file *f = fails(ENOSPC) ? NULL : new_file("");
    return f ? new_handle(f, "") : -1;
}

static DIR *world_fdopendir(int fd)
{
    return fails(ENOMEM) ? NULL : (DIR *)handle_of(fd);
}

/* The names in a directory; in the queue's own those of its directories, as often as they come. */
static struct dirent *world_readdir(DIR *dir)
{
    struct handle *h = (struct handle *)dir;
    size_t n = strlen(h->path);
    while (h->at < file_count) {
        const struct file *f = &files[h->at++];
        const char *name = f->path + (n ? n + 1 : 0);
        size_t len = strcspn(name, "/");
        if (!f->there || (n && (strncmp(f->path, h->path, n) != 0 || f->path[n] != '/' || name[len] == '/')))
            continue;
        snprintf(h->entry.d_name, sizeof h->entry.d_name, "%.*s", (int)len, name);
        return &h->entry;
    }
    return NULL;
}

/* ---- sendmail ---- */

static size_t notices;      /* that it has taken */
static int sendmail_result; /* its exit code; -1: there is no such program */

static int world_spawn(pid_t *pid)
{
    *pid = 1;
    return sendmail_result < 0 ? ENOENT : 0;
}

static pid_t world_waitpid(pid_t pid, int *status)
{
    *status = sendmail_result << 8;
    notices += sendmail_result == 0;
    return pid;
}

/* ---- OpenSSL ---- */

static ssize_t socket_read(struct stream *s, void *data, size_t size);
static ssize_t socket_write(struct stream *s, const void *data, size_t size);

static char tls_token, context_token;
#define TLS_TOKEN ((SSL *)(void *)&tls_token)
#define CONTEXT_TOKEN ((SSL_CTX *)(void *)&context_token)

static X509 *the_certificate; /* everybody's: its names are example.org and other@example.com */
static bool peer_has_certificate;
static long verify_result;
static size_t proofs;       /* comparisons of a whole digest that came out equal, in this execution */

static int world_handshake(void)
{
    char octet;
    return socket_read(&the_session.io, &octet, 1) == 1 && octet == 'T' ? 1 : -1;
}

static X509 *world_peer_certificate(SSL *tls)
{
    if (!tls || !peer_has_certificate)
        return NULL;
    X509_up_ref(the_certificate);
    return the_certificate;
}

static int world_exporter(unsigned char *out, size_t len)
{
    memset(out, 'x', len);
    return 1;
}

static int world_compare(const void *a, const void *b, size_t len)
{
    int different = memcmp(a, b, len);
    proofs += !different && len >= 32;
    return different;
}

static int world_pbkdf2(const char *secret, int len, const unsigned char *salt, int salt_len, unsigned char *out)
{
    return HMAC(EVP_sha256(), secret, len, salt, (size_t)salt_len, out, NULL) != NULL;
}

/* ---- Standard error: what reaches a terminal is one line an event, and nothing but printable ASCII ---- */

static FILE *log_file, *input_file;

static ssize_t log_write(void *cookie, const char *data, size_t size)
{
    (void)cookie;
    for (size_t i = 0; i < size; i++)
        must(data[i] == '\n' || data[i] == '\r' || (data[i] >= 0x20 && data[i] < 0x7f));
    return (ssize_t)size;
}

/* ---- In their place ---- */

#undef stderr
#define stderr log_file
#define printf(...) fprintf(log_file, __VA_ARGS__) /* what a command prints is held to the same */
#undef stdin
#define stdin input_file
#define poll(p, n, ms) world_poll(p, n, ms)
#define recv(fd, data, size, flags) world_recv(fd, data, size, flags)
#define send(fd, data, size, flags) world_send(fd, data, size)
#define shutdown(fd, how) ((void)(fd))
#define close(fd) world_close(fd)
#define clock_gettime(which, t) world_clock(t)
#define time(t) ((time_t)(START_OF_TIME + clock_ms / 1000))
#define getpid() 4711
#define gethostname(out, size) ((int)snprintf(out, size, "host"))
#define isatty(fd) 0
#define openat(dir, path, flags, ...) world_openat(dir, path, flags)
#define mkdirat(dir, path, mode) (errno = fails(ENOSPC) ? ENOSPC : EEXIST, -1) /* all are there already */
#define pread(fd, data, size, at) world_pread(fd, data, size, at)
#define pwrite(fd, data, size, at) world_pwrite(fd, data, size, at)
#define fstat(fd, st) ((fd) < HANDLES_FROM ? -1 : world_fstat(handle_of(fd)->file, st))
#define fstatat(dir, path, st, flags) world_fstat(file_named(whole_path(dir, path)), st)
#define flock(fd, how) world_flock(fd)
#define renameat(from_dir, from, to_dir, to) world_rename(from, to)
#define unlinkat(dir, path, flags) world_unlink(whole_path(dir, path))
#define fsync(fd) world_fsync(fd)
#define fdatasync(fd) world_fsync(fd)
#define futimens(fd, times) ((void)(fd), (void)(times), 0)
#define fcntl(fd, ...) 0
#define fdopen(fd, mode) world_fdopen(fd, mode)
#define fileno(stream) world_fileno(stream)
#define mkostemp(path, flags) ((void)(path), world_mkostemp())
#define unlink(path) 0
#define fdopendir(fd) world_fdopendir(fd)
#define readdir(dir) world_readdir(dir)
#define dirfd(dir) (HANDLES_FROM + (int)((struct handle *)(dir) - handles))
#define closedir(dir) world_close(dirfd(dir))
#define posix_spawnp(pid, file, actions, attributes, argv, environment) world_spawn(pid)
#define waitpid(pid, status, flags) world_waitpid(pid, status)
#define RAND_bytes(out, len) world_random(out, len)
#define PKCS5_PBKDF2_HMAC(secret, len, salt, salt_len, n, md, size, out) world_pbkdf2(secret, len, salt, salt_len, out)
#define CRYPTO_memcmp(a, b, len) world_compare(a, b, len)
#undef SSL_set_tlsext_host_name
#undef SSL_get_cipher_name
#define SSL_new(context) TLS_TOKEN
#define SSL_free(tls) ((void)(tls))
#define SSL_set0_rbio(tls, bio) ((void)(tls), (void)BIO_free(bio))
#define SSL_set0_wbio(tls, bio) ((void)(tls), BIO_free_all(bio))
#define SSL_get_wbio(tls) ((void)(tls), (BIO *)NULL)
#define SSL_get0_param(tls) ((X509_VERIFY_PARAM *)NULL)
#define X509_VERIFY_PARAM_set1_ip_asc(p, host) 1
#define X509_VERIFY_PARAM_set1_host(p, host, size) 1
#define SSL_set_tlsext_host_name(tls, host) 1
#define SSL_accept(tls) world_handshake()
#define SSL_connect(tls) world_handshake()
#define SSL_read(tls, data, size) ((int)socket_read(&the_session.io, data, (size_t)(size)))
#define SSL_write(tls, data, size) ((int)socket_write(&the_session.io, data, (size_t)(size)))
#define SSL_get_error(tls, n) \
    (the_session.io.dry ? SSL_ERROR_WANT_READ : the_session.io.ended ? SSL_ERROR_SYSCALL : SSL_ERROR_SSL)
#define SSL_has_pending(tls) 0
#define SSL_shutdown(tls) 1
#define SSL_version(tls) TLS1_3_VERSION
#define SSL_get_version(tls) ((void)(tls), "TLSv1.3")
#define SSL_get_cipher_name(tls) ((void)(tls), "a cipher")
#define SSL_get_verify_result(tls) verify_result
#define SSL_get1_peer_certificate(tls) world_peer_certificate(tls)
#define SSL_get_certificate(tls) the_certificate
#define SSL_export_keying_material(tls, out, len, label, ...) ((void)(label), world_exporter(out, len))

/* As at the start of the program. */
static void world_begins(void)
{
    file_count = said_len = last_claim = notices = proofs = piece = read_piece = 0;
    clock_ms = 0;
    chance = 0;
    fails_at = 0;
    disk_failed = shutting_down = peer_has_certificate = false;
    sendmail_result = 0;
    verify_result = X509_V_OK;
    when_said = NULL;
    atomic_store(&the_provider.stopping, false);
}

/* Nothing was left open. What was left allocated LeakSanitizer tells. */
static void world_ends(void)
{
    fflush(log_file);
    ERR_clear_error();
    must(handles_open == 0);
}

#pragma clang attribute pop
