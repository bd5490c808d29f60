/* Peers that a provider should survive, and one that it should serve meanwhile.
 *
 *   crowd PORT hold N SECONDS   N connections at once, kept for so long, and up to 10 s more until each has had its
 *                               answer: how many were greeted, how many turned away. A kernel that has no room for
 *                               a connection may lose it without telling the side that has connected
 *   crowd PORT poll N           N sessions of the account "other", which has no mail, one after the other, from
 *                               ::1; the median of what they took, in microseconds
 *   crowd PORT BEHAVIOUR N      N connections that behave so until the provider ends them; how many it did, and
 *                               after how many milliseconds the last. See behaviours[] below. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { CROWD_MAX = 20000, DRIP_MS = 100, PIECE = 65536, PATIENCE = 90, UNREAD_MS = 9000, GRACE_US = 10000000 };
#define GIGABYTE (1LL << 30)

static uint16_t port;

static int64_t now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static int checked(int fd, const void *address, socklen_t len)
{
    if (fd < 0)
        die("crowd: socket");
    if (connect(fd, address, len) < 0 && errno != EINPROGRESS)
        die("crowd: connect");
    return fd;
}

static int connection(int flags)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return checked(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | flags, 0), &address, sizeof address);
}

/* For the limits on sessions, somebody else: ::1. */
static int connection_of_another(void)
{
    struct sockaddr_in6 address = {.sin6_family = AF_INET6, .sin6_addr = in6addr_loopback, .sin6_port = htons(port)};
    return checked(socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0), &address, sizeof address);
}

/* ---- The dialogue ---- */

static bool say(int fd, const char *text)
{
    return send(fd, text, strlen(text), MSG_NOSIGNAL) == (ssize_t)strlen(text);
}

/* The last line of a reply, octet by octet, for nothing behind it may be taken. False: the connection is over. */
static bool hear(int fd, char *line, size_t size)
{
    do {
        size_t n = 0;
        do
            if (recv(fd, line + n, 1, 0) != 1)
                return false;
        while (line[n++] != '\n' && n < size - 1);
        line[n] = '\0';
    } while (line[3] == '-');
    return true;
}

static bool ask(int fd, const char *text, const char *code)
{
    char line[2048];
    return say(fd, text) && hear(fd, line, sizeof line) && strncmp(line, code, 3) == 0;
}

/* RFC 2195, up to the response and not with it. */
static bool challenged(int fd, const char *name, const char *secret, char *response, size_t size)
{
    char line[2048], plain[512];
    unsigned char challenge[1024], digest[EVP_MAX_MD_SIZE];
    unsigned len;
    int n, used;
    if (!hear(fd, line, sizeof line) || !ask(fd, "EHLO crowd.example\r\n", "250") || !say(fd, "AUTH CRAM-MD5\r\n") ||
        !hear(fd, line, sizeof line) || strncmp(line, "334 ", 4) != 0)
        return false;
    line[strcspn(line, "\r")] = '\0';
    n = EVP_DecodeBlock(challenge, (unsigned char *)line + 4, (int)strlen(line + 4));
    for (size_t i = strlen(line); n > 0 && line[i - 1] == '='; i--)
        n--;
    if (n <= 0 || !HMAC(EVP_md5(), secret, (int)strlen(secret), challenge, (size_t)n, digest, &len))
        return false;
    used = snprintf(plain, sizeof plain, "%s ", name);
    for (unsigned i = 0; i < len; i++)
        used += snprintf(plain + used, sizeof plain - (size_t)used, "%02x", digest[i]);
    n = EVP_EncodeBlock((unsigned char *)response, (unsigned char *)plain, used);
    snprintf(response + n, size - (size_t)n, "\r\n");
    return true;
}

static bool log_in(int fd, const char *name, const char *secret)
{
    char response[1024];
    return challenged(fd, name, secret, response, sizeof response) && ask(fd, response, "235");
}

/* Up to the provider's EHLO. */
static bool reversed(int fd)
{
    char line[2048];
    return log_in(fd, "example.org", "tanstaaf") && ask(fd, "ATRN\r\n", "250") &&
           say(fd, "220 crowd.example\r\n") && hear(fd, line, sizeof line);
}

static bool offered(int fd)
{
    return reversed(fd) && say(fd, "250-crowd.example\r\n250-PIPELINING\r\n250 CHUNKING\r\n");
}

/* ---- Behaviours: each returns when the provider has ended the connection ---- */

static void wait_for_end(int fd)
{
    char data[PIECE];
    while (recv(fd, data, sizeof data, 0) > 0)
        ;
}

/* An octet now and then, of a line that has no end. */
static void drip(int fd)
{
    struct pollfd p = {.fd = fd, .events = POLLIN};
    char data[PIECE];
    while (say(fd, "2"))
        if (poll(&p, 1, DRIP_MS) > 0 && recv(fd, data, sizeof data, MSG_DONTWAIT) <= 0)
            return;
}

/* Without end, or up to a gigabyte; what the provider says is not read. */
static void flood(int fd, const char *text)
{
    char data[PIECE];
    size_t len = strlen(text), size = sizeof data / len * len;
    ssize_t n = 1;
    for (size_t i = 0; i < size; i += len)
        memcpy(data + i, text, len);
    for (long long sent = 0; n > 0 && sent < GIGABYTE; sent += n)
        n = send(fd, data, size, MSG_NOSIGNAL);
    wait_for_end(fd);
}

static void silent(int fd)
{
    wait_for_end(fd);
}

static void drip_command(int fd)
{
    drip(fd);
}

static void drip_response(int fd)
{
    char response[1024];
    if (challenged(fd, "other", "x", response, sizeof response))
        drip(fd);
}

static void drip_greeting(int fd)
{
    if (log_in(fd, "example.org", "tanstaaf") && ask(fd, "ATRN\r\n", "250"))
        drip(fd);
}

static void drip_reply(int fd)
{
    if (offered(fd))
        drip(fd);
}

/* Whoever does not read does not see the end either: it comes behind what was not read. */
static void unread(int fd)
{
    if (offered(fd))
        poll(NULL, 0, UNREAD_MS);
}

static void unanswered(int fd)
{
    if (offered(fd))
        wait_for_end(fd);
}

static void endless_command(int fd)
{
    flood(fd, "EHLO");
}

static void endless_reply(int fd)
{
    if (reversed(fd))
        flood(fd, "250 ");
}

static void endless_lines(int fd)
{
    if (reversed(fd))
        flood(fd, "250-and so on\r\n");
}

static void endless_replies(int fd)
{
    if (offered(fd))
        flood(fd, "450 no\r\n");
}

static void endless_commands(int fd)
{
    flood(fd, "WHAT\r\n");
}

static const struct {
    const char *name;
    void (*behave)(int fd);
} behaviours[] = {
    {"silent", silent},                   /* nothing, from the start */
    {"drip-command", drip_command},       /* an octet now and then, in a command, */
    {"drip-response", drip_response},     /* in AUTH's response, */
    {"drip-greeting", drip_greeting},     /* and, the roles being reversed, in the greeting */
    {"drip-reply", drip_reply},           /* and in the first reply to mail */
    {"unread", unread},                   /* offers CHUNKING and reads no more */
    {"unanswered", unanswered},           /* offers CHUNKING, takes all, answers nothing */
    {"endless-command", endless_command}, /* a line of a gigabyte, as a command */
    {"endless-reply", endless_reply},     /* and as a reply */
    {"endless-lines", endless_lines},     /* a reply of more and more lines */
    {"endless-replies", endless_replies}, /* replies to what was never said */
    {"endless-commands", endless_commands},
};

static void (*behave)(int fd);

static void *behave_once(void *argument)
{
    int fd = connection(0);
    (void)argument;
    behave(fd);
    close(fd);
    return NULL;
}

static void behave_all(size_t n)
{
    pthread_t *threads = calloc(n, sizeof *threads);
    int64_t start = now_us();
    for (size_t i = 0; threads && i < n; i++)
        if (pthread_create(&threads[i], NULL, behave_once, NULL) != 0)
            die("crowd: thread");
    for (size_t i = 0; threads && i < n; i++)
        pthread_join(threads[i], NULL);
    printf("%zu ended, %lld ms\n", n, (long long)(now_us() - start) / 1000);
    free(threads);
}

/* ---- The burst ---- */

static void hold(size_t n, int seconds)
{
    static struct pollfd p[CROWD_MAX];
    size_t answered = 0, greeted = 0, turned_away = 0;
    int64_t until = now_us() + (int64_t)seconds * 1000000;
    char code[4] = "";
    for (size_t i = 0; i < n; i++)
        p[i] = (struct pollfd){.fd = connection(SOCK_NONBLOCK), .events = POLLIN};
    while (now_us() < (answered < n ? until + GRACE_US : until)) {
        if (poll(p, n, 100) <= 0)
            continue;
        for (size_t i = 0; i < n; i++) {
            if (p[i].fd < 0 || !p[i].revents)
                continue;
            ssize_t got = recv(p[i].fd, code, 3, 0);
            greeted += got == 3 && strncmp(code, "220", 3) == 0;
            turned_away += got == 3 && strncmp(code, "421", 3) == 0;
            answered++;
            p[i].events = 0;
            p[i].fd = -1 - p[i].fd; /* poll() passes over it; it stays open */
        }
    }
    printf("%zu greeted, %zu turned away, %zu without a word\n", greeted, turned_away, n - greeted - turned_away);
}

static int by_size(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static void poll_provider(size_t n)
{
    int64_t *took = calloc(n, sizeof *took);
    for (size_t i = 0; took && i < n; i++) {
        int64_t start = now_us();
        int fd = connection_of_another();
        if (!log_in(fd, "other", "another secret: with colons") || !ask(fd, "ATRN\r\n", "453") ||
            !ask(fd, "QUIT\r\n", "221")) {
            fputs("crowd: a session was not served\n", stderr);
            exit(1);
        }
        close(fd);
        took[i] = now_us() - start;
    }
    if (took)
        qsort(took, n, sizeof *took, by_size);
    printf("%lld\n", took ? (long long)took[n / 2] : -1);
    free(took);
}

int main(int argc, char **argv)
{
    struct rlimit limit;
    size_t n = argc > 3 ? strtoul(argv[3], NULL, 10) : 0;
    if (n < 1 || n > CROWD_MAX) {
        fputs("usage: crowd PORT hold N SECONDS | crowd PORT poll N | crowd PORT BEHAVIOUR N\n", stderr);
        return 64;
    }
    port = (uint16_t)atoi(argv[1]);
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    alarm(PATIENCE); /* whoever is not ended by then never will be */
    if (strcmp(argv[2], "hold") == 0) {
        hold(n, argc > 4 ? atoi(argv[4]) : 1);
        return 0;
    }
    if (strcmp(argv[2], "poll") == 0) {
        poll_provider(n);
        return 0;
    }
    for (size_t i = 0; i < sizeof behaviours / sizeof *behaviours; i++)
        if (strcmp(behaviours[i].name, argv[2]) == 0)
            behave = behaviours[i].behave;
    if (!behave)
        return 64;
    behave_all(n);
    return 0;
}
