/* TLS with records that carry no application data, for tests: whoever connects to it is connected to HOST:PORT, and
 *
 *   --cert FILE   the connecting side speaks TLS; FILE has the certificate and its key. Without this option, the side
 *                 of HOST:PORT speaks TLS;
 *   --flood       after the handshake, nothing is passed on: the TLS side gets key updates without end.
 *   --random SEED what is passed on is divided at random places, and a part of the pieces is followed by such records.
 *
 * Behind all that is passed on to the TLS side there follow, in the same segment, a key update and (with --cert) a
 * session ticket. It listens on a free port of 127.0.0.1, prints the port, and serves until it is killed, each
 * connection in a process of its own. TLS 1.3 only. */

#define _GNU_SOURCE
#include <getopt.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/ssl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { PIECE = 16384 };

static const char *cert;
static bool flood, at_random;

static void die(const char *what)
{
    perror(what);
    _exit(1);
}

static int loopback(const char *port, bool to_connect)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof address;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    address.sin_port = htons((unsigned short)atoi(port));
    if (fd < 0 || (to_connect ? connect(fd, (struct sockaddr *)&address, len)
                              : bind(fd, (struct sockaddr *)&address, len) < 0 || listen(fd, 128) < 0))
        die("tls: no socket");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
    return fd;
}

static bool write_all(int fd, const char *data, size_t len)
{
    while (len > 0) {
        ssize_t n = send(fd, data, len, MSG_NOSIGNAL);
        if (n <= 0)
            return false;
        data += n;
        len -= (size_t)n;
    }
    return true;
}

/* All that OpenSSL has to send, at once. */
static bool send_records(SSL *tls, int fd)
{
    char *data;
    long len = BIO_get_mem_data(SSL_get_wbio(tls), &data);
    bool sent = len <= 0 || write_all(fd, data, (size_t)len);
    (void)BIO_reset(SSL_get_wbio(tls));
    return sent;
}

/* What the TLS side has sent, for OpenSSL to read. */
static bool take_records(SSL *tls, int fd)
{
    char data[PIECE];
    ssize_t n = recv(fd, data, sizeof data, 0);
    return n > 0 && BIO_write(SSL_get_rbio(tls), data, (int)n) == n;
}

static bool shake_hands(SSL *tls, int fd)
{
    while (SSL_do_handshake(tls) != 1)
        if (!send_records(tls, fd) || !take_records(tls, fd))
            return false;
    return send_records(tls, fd);
}

/* A key update, a ticket, or both; where the places are random, often neither. */
static bool send_noise(SSL *tls, int fd)
{
    if (at_random && rand() % 3)
        return send_records(tls, fd);
    SSL_key_update(tls, SSL_KEY_UPDATE_NOT_REQUESTED);
    SSL_do_handshake(tls);
    if (cert)
        SSL_new_session_ticket(tls);
    SSL_do_handshake(tls);
    return send_records(tls, fd);
}

static void pass_on(SSL *tls, int tls_fd, int plain_fd)
{
    struct pollfd p[2] = {{.fd = tls_fd, .events = POLLIN}, {.fd = plain_fd, .events = POLLIN}};
    bool both = true;
    while (both && poll(p, 2, -1) > 0) {
        char data[PIECE];
        ssize_t n;
        if (p[0].revents) {
            both = take_records(tls, tls_fd);
            while ((n = SSL_read(tls, data, sizeof data)) > 0 && write_all(plain_fd, data, (size_t)n))
                ;
        }
        if (p[1].revents) {
            n = recv(plain_fd, data, sizeof data, 0);
            both = n > 0;
            for (ssize_t at = 0, piece; both && at < n; at += piece) {
                piece = at_random ? 1 + rand() % (rand() % 4 ? 40 : 4000) : n;
                piece = piece < n - at ? piece : n - at;
                both = SSL_write(tls, data + at, (int)piece) == piece && send_noise(tls, tls_fd);
            }
        }
    }
    SSL_shutdown(tls);
    send_records(tls, tls_fd);
}

static void serve(int connected, const char *to)
{
    SSL_CTX *context = SSL_CTX_new(cert ? TLS_server_method() : TLS_client_method());
    SSL *tls;
    int other = loopback(strrchr(to, ':') + 1, true);
    int tls_fd = cert ? connected : other, plain_fd = cert ? other : connected;
    SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION);
    if (cert && (SSL_CTX_use_certificate_chain_file(context, cert) != 1 ||
                 SSL_CTX_use_PrivateKey_file(context, cert, SSL_FILETYPE_PEM) != 1))
        die("tls: no certificate");
    tls = SSL_new(context);
    SSL_set_bio(tls, BIO_new(BIO_s_mem()), BIO_new(BIO_s_mem()));
    if (cert)
        SSL_set_accept_state(tls);
    else
        SSL_set_connect_state(tls);
    if (!shake_hands(tls, tls_fd))
        die("tls: no handshake");
    while (flood && send_noise(tls, tls_fd))
        ;
    pass_on(tls, tls_fd, plain_fd);
    _exit(0);
}

int main(int argc, char **argv)
{
    static const struct option known[] = {
        {"cert", required_argument, NULL, 'c'}, {"flood", no_argument, NULL, 'f'},
        {"random", required_argument, NULL, 'r'}, {NULL, 0, NULL, 0}};
    struct sockaddr_in address;
    socklen_t len = sizeof address;
    int option, fd;
    while ((option = getopt_long(argc, argv, "", known, NULL)) != -1) {
        if (option == 'c')
            cert = optarg;
        flood |= option == 'f';
        at_random |= option == 'r';
        if (option == 'r')
            srand((unsigned)atoi(optarg));
    }
    if (optind + 1 != argc || !strrchr(argv[optind], ':'))
        die("tls: [--cert FILE] [--flood] [--random SEED] HOST:PORT");
    signal(SIGCHLD, SIG_IGN);
    fd = loopback("0", false);
    getsockname(fd, (struct sockaddr *)&address, &len);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    for (;;) {
        int connected = accept4(fd, NULL, NULL, SOCK_CLOEXEC);
        if (connected < 0)
            continue;
        setsockopt(connected, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
        rand(); /* each connection has places of its own */
        if (fork() == 0)
            serve(connected, argv[optind]);
        close(connected);
    }
}
