/* What make bench measures with, beside odmr itself and Postfix's smtp-source and smtp-sink:
 *
 *   bench fill DIR DOMAIN N SIZE        N messages of SIZE octets into DIR/DOMAIN/new
 *   bench files DIR DOMAIN N SIZE       the plain loop: create, write, fsync, rename
 *   bench pump [--tls CERT] FILE...     one thread reads the files and writes them to a socket, another reads there
 *   bench pump --mail FILE...           the same, but as SMTP wants mail: its size told beforehand, lines ended by CRLF
 *   bench take [--tls] PORT USER        a CHUNKING customer that discards what it gets
 *   bench poll PORT USER N              N sessions that hear 453
 *   bench first PORT USER N             N sessions that leave with the first octet of mail
 *   bench idle PORT N                   N sessions that say EHLO and then nothing, until standard input ends
 *
 * All on 127.0.0.1; the secret is in ODMR_SECRET. On standard output: seconds, and what was counted; of first: the
 * median times from ATRN to its reply and to the first octet of a message. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <openssl/ssl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { BUFFER = 65536, LINE = 78 };

static void die(const char *what)
{
    fprintf(stderr, "bench: %s: %s\n", what, errno ? strerror(errno) : "not what was expected");
    exit(1);
}

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* ---- A line to somebody ---- */

struct line {
    int fd;
    SSL *tls;
    size_t at, end;
    char buffer[BUFFER];
};

static int connected(int port)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port),
                            .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&a, sizeof a) < 0)
        die("connect");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
    return fd;
}

static SSL *with_tls(int fd, const char *cert)
{
    SSL_CTX *context = SSL_CTX_new(cert ? TLS_server_method() : TLS_client_method());
    SSL *tls;
    if (!context || (cert && (SSL_CTX_use_certificate_chain_file(context, cert) != 1 ||
                              SSL_CTX_use_PrivateKey_file(context, cert, SSL_FILETYPE_PEM) != 1)))
        die("TLS");
    tls = SSL_new(context);
    if (!tls || SSL_set_fd(tls, fd) != 1 || (cert ? SSL_accept(tls) : SSL_connect(tls)) != 1)
        die("TLS handshake");
    return tls;
}

static size_t take(struct line *l)
{
    ssize_t n = l->tls ? SSL_read(l->tls, l->buffer, BUFFER) : recv(l->fd, l->buffer, BUFFER, 0);
    l->at = 0;
    l->end = n > 0 ? (size_t)n : 0;
    return l->end;
}

static void give(struct line *l, const char *text)
{
    int len = (int)strlen(text);
    if ((l->tls ? SSL_write(l->tls, text, len) : (int)send(l->fd, text, (size_t)len, MSG_NOSIGNAL)) != len)
        die("send");
}

/* One line without its CRLF. */
static void hear(struct line *l, char *out, size_t size)
{
    size_t n = 0;
    for (;;) {
        if (l->at == l->end && take(l) == 0)
            die("the provider hung up");
        if (n + 1 < size)
            out[n++] = l->buffer[l->at];
        if (l->buffer[l->at++] == '\n')
            break;
    }
    out[n] = '\0';
    out[strcspn(out, "\r\n")] = '\0';
}

static void expect(struct line *l, const char *code, char *out, size_t size)
{
    errno = 0;
    do
        hear(l, out, size);
    while (out[3] == '-');
    if (strncmp(out, code, 3) != 0)
        die(out);
}

/* A response in base64. */
static void give_response(struct line *l, const char *before, const char *response, int len)
{
    char text[1024];
    int n = snprintf(text, sizeof text, "%s", before);
    n += EVP_EncodeBlock((unsigned char *)text + n, (const unsigned char *)response, len);
    memcpy(text + n, "\r\n", 3);
    give(l, text);
}

/* Greeting, EHLO, AUTH: CRAM-MD5, and PLAIN inside TLS, for of CRAM-MD5 the provider thinks that it is fetchmail. */
static void log_in(struct line *l, const char *user)
{
    const char *secret = getenv("ODMR_SECRET");
    char reply[1024], challenge[1024], response[512];
    unsigned char mac[16];
    int n;
    if (!secret)
        die("ODMR_SECRET");
    expect(l, "220", reply, sizeof reply);
    give(l, "EHLO bench.example\r\n");
    expect(l, "250", reply, sizeof reply);
    if (l->tls) {
        n = snprintf(response, sizeof response, "%c%s%c%s", 0, user, 0, secret);
        give_response(l, "AUTH PLAIN ", response, n);
        expect(l, "235", reply, sizeof reply);
        return;
    }
    give(l, "AUTH CRAM-MD5\r\n");
    expect(l, "334", reply, sizeof reply);
    n = EVP_DecodeBlock((unsigned char *)challenge, (unsigned char *)reply + 4, (int)strlen(reply + 4));
    for (const char *p = reply + strlen(reply); n > 0 && p[-1] == '='; p--)
        n--;
    if (n < 0 || !HMAC(EVP_md5(), secret, (int)strlen(secret), (unsigned char *)challenge, (size_t)n, mac, NULL))
        die("CRAM-MD5");
    n = snprintf(response, sizeof response, "%s ", user);
    for (size_t i = 0; i < sizeof mac; i++)
        n += snprintf(response + n, sizeof response - (size_t)n, "%02x", mac[i]);
    give_response(l, "", response, n);
    expect(l, "235", reply, sizeof reply);
}

/* ---- take: the customer that discards ---- */

static void discard(struct line *l, unsigned long long octets)
{
    while (octets > 0) {
        size_t part;
        if (l->at == l->end && take(l) == 0)
            die("cut in a message");
        part = l->end - l->at < octets ? l->end - l->at : (size_t)octets;
        l->at += part;
        octets -= part;
    }
}

/* Every reply is an OK; they leave together when there is nothing left to read. */
static void take_mail(struct line *l)
{
    static const char offer[] = "250-bench.example\r\n250-PIPELINING\r\n250-8BITMIME\r\n250 CHUNKING\r\n";
    char command[1024], replies[BUFFER] = "";
    unsigned long long messages = 0, octets = 0;
    double start = seconds();
    size_t owed = 0;
    give(l, "220 bench.example\r\n");
    for (;;) {
        if (l->at == l->end || owed > BUFFER - 64) {
            if (owed)
                give(l, replies);
            owed = 0;
        }
        hear(l, command, sizeof command);
        if (strncmp(command, "EHLO", 4) == 0) {
            give(l, offer);
            continue;
        }
        if (strcmp(command, "QUIT") == 0)
            break;
        if (strncmp(command, "BDAT ", 5) == 0) {
            unsigned long long n = strtoull(command + 5, NULL, 10);
            discard(l, n);
            messages++;
            octets += n;
        }
        memcpy(replies + owed, "250 OK\r\n", 9);
        owed += 8;
    }
    give(l, "221 bye\r\n");
    printf("%.4f %llu messages %llu octets\n", seconds() - start, messages, octets);
}

static int main_take(int argc, char **argv)
{
    static struct line l;
    char reply[1024];
    bool tls = argc > 1 && strcmp(argv[1], "--tls") == 0;
    if (argc != 3 + tls)
        return 64;
    l.fd = connected(atoi(argv[1 + tls]));
    if (tls)
        l.tls = with_tls(l.fd, NULL);
    log_in(&l, argv[2 + tls]);
    give(&l, "ATRN\r\n");
    expect(&l, "250", reply, sizeof reply);
    take_mail(&l);
    return 0;
}

/* ---- poll and idle ---- */

static int main_poll(int argc, char **argv)
{
    static struct line l;
    char reply[1024];
    double start = seconds();
    int n = argc == 4 ? atoi(argv[3]) : 0;
    for (int i = 0; i < n; i++) {
        l.at = l.end = 0;
        l.fd = connected(atoi(argv[1]));
        log_in(&l, argv[2]);
        give(&l, "ATRN\r\n");
        expect(&l, "453", reply, sizeof reply);
        give(&l, "QUIT\r\n");
        expect(&l, "221", reply, sizeof reply);
        close(l.fd);
    }
    printf("%.4f %d polls\n", seconds() - start, n);
    return 0;
}

static int by_size(const void *left, const void *right)
{
    double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

/* ATRN until it is granted; 451 is the answer while the session before has not let go of its message. Returns when
 * the one that was granted was sent. */
static double turn_round(struct line *l)
{
    char reply[1024] = "";
    double start = 0;
    for (int i = 0; i < 100 && strncmp(reply, "250", 3) != 0; i++) {
        usleep(reply[0] ? 20000 : 0);
        start = seconds();
        give(l, "ATRN\r\n");
        hear(l, reply, sizeof reply);
        if (strncmp(reply, "250", 3) != 0 && strncmp(reply, "451", 3) != 0)
            break;
    }
    errno = 0;
    if (strncmp(reply, "250", 3) != 0)
        die(reply);
    return start;
}

static int main_first(int argc, char **argv)
{
    static struct line l;
    static double to_reply[1000], to_mail[1000];
    char text[1024];
    int n = argc == 4 ? atoi(argv[3]) : 0;
    if (n < 1 || n > 1000)
        return 64;
    for (int i = 0; i < n; i++) {
        double start;
        l.at = l.end = 0;
        l.fd = connected(atoi(argv[1]));
        log_in(&l, argv[2]);
        start = turn_round(&l);
        to_reply[i] = seconds() - start;
        give(&l, "220 bench.example\r\n");
        hear(&l, text, sizeof text);
        give(&l, "250-bench.example\r\n250-PIPELINING\r\n250-8BITMIME\r\n250 CHUNKING\r\n");
        do
            hear(&l, text, sizeof text);
        while (strncmp(text, "BDAT", 4) != 0);
        if (l.at == l.end && take(&l) == 0)
            die("no mail");
        to_mail[i] = seconds() - start;
        close(l.fd);
    }
    qsort(to_reply, (size_t)n, sizeof *to_reply, by_size);
    qsort(to_mail, (size_t)n, sizeof *to_mail, by_size);
    printf("%.6f %.6f\n", to_reply[n / 2], to_mail[n / 2]);
    return 0;
}

static int main_idle(int argc, char **argv)
{
    static struct line l;
    char reply[1024];
    int n = argc == 3 ? atoi(argv[2]) : 0;
    for (int i = 0; i < n; i++) {
        l.at = l.end = 0;
        l.fd = connected(atoi(argv[1]));
        expect(&l, "220", reply, sizeof reply);
        give(&l, "EHLO bench.example\r\n");
        expect(&l, "250", reply, sizeof reply);
    }
    printf("%d sessions\n", n);
    fflush(stdout);
    while (getchar() != EOF)
        ;
    return 0;
}

/* ---- Files ---- */

/* A message of that many octets, lines of LINE octets. */
static char *message_of(size_t size, const char *top, size_t *len)
{
    size_t n = strlen(top);
    char *text = malloc(n + size);
    if (!text)
        die("memory");
    memcpy(text, top, n);
    for (size_t i = 0; i < size; i++)
        text[n + i] = i % LINE == LINE - 1 || i + 1 == size ? '\n' : (char)('a' + i % 26);
    *len = n + size;
    return text;
}

static void make_boxes(const char *dir, const char *domain)
{
    static const char *const boxes[] = {"", "/tmp", "/cur", "/new"};
    char path[512];
    mkdir(dir, 0700);
    for (size_t i = 0; i < sizeof boxes / sizeof *boxes; i++) {
        snprintf(path, sizeof path, "%s/%s%s", dir, domain, boxes[i]);
        if (mkdir(path, 0700) < 0 && errno != EEXIST)
            die(path);
    }
}

static void write_file(const char *path, const char *text, size_t len, bool sync)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL, 0600);
    if (fd < 0 || write(fd, text, len) != (ssize_t)len || (sync && fsync(fd) < 0) || close(fd) < 0)
        die(path);
}

static int main_fill(int argc, char **argv, bool sync)
{
    char tmp[512], path[512], top[256], *text;
    size_t len;
    double start;
    int n = argc == 5 ? atoi(argv[3]) : 0;
    if (!n)
        return 64;
    make_boxes(argv[1], argv[2]);
    snprintf(top, sizeof top, "Return-Path: <a@example.edu>\nDelivered-To: eva@%s\nSubject: bench\n\n", argv[2]);
    text = message_of((size_t)atoll(argv[4]), top, &len);
    start = seconds();
    for (int i = 0; i < n; i++) {
        snprintf(tmp, sizeof tmp, "%s/%s/tmp/%d.M%d.bench", argv[1], argv[2], 1700000000 + i, i);
        snprintf(path, sizeof path, "%s/%s/new/%d.M%d.bench", argv[1], argv[2], 1700000000 + i, i);
        write_file(sync ? tmp : path, text, len, sync);
        if (sync && rename(tmp, path) < 0)
            die(path);
    }
    printf("%.4f %d files\n", seconds() - start, n);
    free(text);
    return 0;
}

/* ---- pump: what a socket and one thread can do ---- */

struct pump {
    int listener;
    bool tls;
    unsigned long long octets;
};

static void *drain(void *argument)
{
    static struct line l;
    struct pump *p = argument;
    struct sockaddr_in a;
    socklen_t len = sizeof a;
    getsockname(p->listener, (struct sockaddr *)&a, &len);
    l.fd = connected(ntohs(a.sin_port));
    if (p->tls)
        l.tls = with_tls(l.fd, NULL);
    while (take(&l) > 0)
        p->octets += l.end;
    return NULL;
}

static void pump_out(int fd, SSL *ssl, const char *data, ssize_t n)
{
    for (ssize_t at = 0, sent; at < n; at += sent)
        if ((sent = ssl ? SSL_write(ssl, data + at, (int)(n - at)) : write(fd, data + at, (size_t)(n - at))) <= 0)
            die("write");
}

/* How large it is with CRLF. */
static unsigned long long wire_size(int file)
{
    static char data[BUFFER];
    unsigned long long size = 0;
    off_t at = 0;
    ssize_t n;
    while ((n = pread(file, data, sizeof data, at)) > 0) {
        memset(data + n, 0, sizeof data - (size_t)n);
        for (ssize_t i = 0; i < n; i += 128) { /* an octet can hold the count of so many */
            unsigned char newlines = 0;
            for (ssize_t k = 0; k < 128; k++)
                newlines += data[i + k] == '\n';
            size += newlines;
        }
        at += n;
    }
    return size + (unsigned long long)at;
}

static ssize_t with_crlf(char *out, const char *data, ssize_t n)
{
    const char *end = data + n;
    char *start = out;
    while (data < end) {
        const char *newline = memchr(data, '\n', (size_t)(end - data));
        size_t len = (size_t)((newline ? newline : end) - data);
        memcpy(out, data, len);
        out += len;
        data += len;
        if (newline) {
            *out++ = '\r';
            *out++ = *data++;
        }
    }
    return out - start;
}

static int main_pump(int argc, char **argv)
{
    static char data[BUFFER], wire[2 * BUFFER];
    bool tls = argc > 2 && strcmp(argv[1], "--tls") == 0, mail = argc > 1 && strcmp(argv[1], "--mail") == 0;
    struct pump p = {.listener = socket(AF_INET, SOCK_STREAM, 0), .tls = tls};
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    unsigned long long told = 0;
    pthread_t thread;
    double start;
    SSL *ssl = NULL;
    int fd;
    if (bind(p.listener, (struct sockaddr *)&a, sizeof a) < 0 || listen(p.listener, 1) < 0 ||
        pthread_create(&thread, NULL, drain, &p) != 0 || (fd = accept(p.listener, NULL, NULL)) < 0)
        die("pump");
    if (tls)
        ssl = with_tls(fd, argv[2]);
    start = seconds();
    for (int i = 1 + 2 * tls + mail; i < argc; i++) {
        int file = open(argv[i], O_RDONLY);
        ssize_t n;
        if (file < 0)
            die(argv[i]);
        told += mail ? wire_size(file) : 0;
        while ((n = read(file, data, sizeof data)) > 0)
            if (mail)
                pump_out(fd, ssl, wire, with_crlf(wire, data, n));
            else
                pump_out(fd, ssl, data, n);
        close(file);
    }
    if (ssl)
        SSL_shutdown(ssl);
    close(fd);
    pthread_join(thread, NULL);
    errno = 0;
    if (mail && told != p.octets)
        die("the size that was told");
    printf("%.4f %llu octets\n", seconds() - start, p.octets);
    return 0;
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    int code = 64;
    argc--, argv++;
    if (strcmp(what, "fill") == 0)
        code = main_fill(argc, argv, false);
    else if (strcmp(what, "files") == 0)
        code = main_fill(argc, argv, true);
    else if (strcmp(what, "pump") == 0)
        code = main_pump(argc, argv);
    else if (strcmp(what, "take") == 0)
        code = main_take(argc, argv);
    else if (strcmp(what, "poll") == 0)
        code = main_poll(argc, argv);
    else if (strcmp(what, "first") == 0)
        code = main_first(argc, argv);
    else if (strcmp(what, "idle") == 0)
        code = main_idle(argc, argv);
    if (code == 64)
        fputs("bench: see the top of bench.c\n", stderr);
    return code;
}
