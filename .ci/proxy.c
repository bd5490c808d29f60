/* A bad line, for tests and experiments: whoever connects to it is connected to HOST:PORT, but
 *
 *   --delay MS          every octet takes so long, in each direction;
 *   --strip KEYWORD     the connecting side's lines "250-KEYWORD..." do not arrive, as if it did not offer that;
 *   --cut-out N         after N octets from the connecting side the line is gone,
 *   --cut-in N          or after N octets to it; --reset: with a reset, not an end of file;
 *   --plan FILE         all this anew for each connection: FILE says "out N", "in N" or "none", and "reset" or
 *                       "end" behind it;
 *   --tally FILE        holds, once a connection is over, how many octets it has passed: out, then in.
 *
 * It listens on a free port of 127.0.0.1, prints the port, and serves until it is killed, each connection in a
 * process of its own. What one side does not read yet is kept in memory, without a limit. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { PIECE = 65536, STRIPS = 8, LONGEST_LINE = 4096 };

static struct {
    int64_t delay;
    long long cut[2]; /* by direction: 0 out, from the connecting side; 1 in. -1: never */
    bool reset;
    const char *plan, *tally;
    const char *strip[STRIPS];
    int strips;
} options = {.cut = {-1, -1}};

/* What was read and is not due yet, or not taken yet. */
struct piece {
    struct piece *next;
    int64_t due;
    size_t at, len;
    char data[];
};

struct direction {
    int from, to;
    long long left; /* octets until the cut; -1: no cut */
    long long passed;
    bool ended;     /* from has said all */
    struct piece *first, **last;
    char line[LONGEST_LINE];
    size_t line_len;
};

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static int64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static void keep(struct direction *d, const char *data, size_t len)
{
    struct piece *p = malloc(sizeof *p + len);
    if (!p)
        die("proxy");
    *p = (struct piece){.due = now() + options.delay, .len = len};
    memcpy(p->data, data, len);
    *d->last = p;
    d->last = &p->next;
}

static bool stripped(const char *line)
{
    for (int i = 0; i < options.strips; i++)
        if (strncmp(line, "250-", 4) == 0 && strncasecmp(line + 4, options.strip[i], strlen(options.strip[i])) == 0)
            return true;
    return false;
}

/* Line by line, so that a line can be left out. */
static void keep_lines(struct direction *d, const char *data, size_t len)
{
    for (size_t i = 0; i < len; i++) {
        d->line[d->line_len++] = data[i];
        if (data[i] != '\n' && d->line_len < sizeof d->line - 1)
            continue;
        d->line[d->line_len] = '\0';
        if (!stripped(d->line))
            keep(d, d->line, d->line_len);
        d->line_len = 0;
    }
}

static void read_some(struct direction *d, bool by_line)
{
    char data[PIECE];
    ssize_t n = recv(d->from, data, sizeof data, 0);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n <= 0)
        d->ended = true;
    else if (by_line)
        keep_lines(d, data, (size_t)n);
    else
        keep(d, data, (size_t)n);
}

static bool due(const struct direction *d, int64_t when)
{
    return d->first && d->first->due <= when;
}

/* How long until something is due; -1: that is not what there is to wait for. */
static int patience(const struct direction *d, int64_t when)
{
    return d->first && d->first->due > when ? (int)(d->first->due - when) : -1;
}

/* Sends what is due. False: the line is to be cut now, or is gone. */
static bool write_some(struct direction *d)
{
    while (due(d, now())) {
        struct piece *p = d->first;
        size_t len = p->len - p->at;
        ssize_t n;
        if (d->left >= 0 && (long long)len > d->left)
            len = (size_t)d->left;
        n = len ? send(d->to, p->data + p->at, len, MSG_NOSIGNAL) : 0;
        if (n < 0)
            return errno == EAGAIN || errno == EINTR;
        p->at += (size_t)n;
        d->passed += n;
        d->left -= d->left >= 0 ? n : 0;
        if (d->left == 0)
            return false;
        if (p->at == p->len) {
            d->first = p->next;
            if (!d->first)
                d->last = &d->first;
            free(p);
        }
    }
    if (d->ended && !d->first)
        shutdown(d->to, SHUT_WR);
    return true;
}

/* What is to become of this connection. */
static void read_plan(void)
{
    char what[8] = "", how[8] = "";
    long long after = 0;
    FILE *plan = fopen(options.plan, "r");
    if (!plan || fscanf(plan, "%7s %lld %7s", what, &after, how) < 1)
        die("proxy: no plan");
    fclose(plan);
    options.cut[0] = strcmp(what, "out") == 0 ? after : -1;
    options.cut[1] = strcmp(what, "in") == 0 ? after : -1;
    options.reset = strcmp(how, "reset") == 0;
}

/* Whole at once, for somebody waits for it. */
static void write_tally(const struct direction d[2])
{
    char name[4096];
    FILE *tally;
    snprintf(name, sizeof name, "%s.new", options.tally);
    tally = fopen(name, "w");
    if (!tally || fprintf(tally, "%lld %lld\n", d[0].passed, d[1].passed) < 0 || fclose(tally) != 0 ||
        rename(name, options.tally) < 0)
        die("proxy: no tally");
}

static void serve(int client, int server)
{
    struct direction d[2] = {{.from = client, .to = server, .left = options.cut[0]},
                             {.from = server, .to = client, .left = options.cut[1]}};
    struct linger at_once = {.l_onoff = 1};
    bool whole = true;
    for (int i = 0; i < 2; i++) {
        d[i].last = &d[i].first;
        fcntl(d[i].from, F_SETFL, O_NONBLOCK);
        setsockopt(d[i].from, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
        whole = whole && d[i].left != 0;
    }
    while (whole && !(d[0].ended && !d[0].first && d[1].ended && !d[1].first)) {
        struct pollfd p[2];
        int64_t when = now();
        int out = patience(&d[0], when), in = patience(&d[1], when);
        for (int i = 0; i < 2; i++) { /* each socket is where one direction comes from and the other goes to */
            short events = (short)((d[i].ended ? 0 : POLLIN) | (due(&d[1 - i], when) ? POLLOUT : 0));
            p[i] = (struct pollfd){.fd = events ? d[i].from : -1, .events = events};
        }
        poll(p, 2, out < 0 || (in >= 0 && in < out) ? in : out);
        for (int i = 0; i < 2; i++)
            if (p[i].revents & (POLLIN | POLLHUP | POLLERR) && !d[i].ended)
                read_some(&d[i], i == 0 && options.strips > 0);
        for (int i = 0; i < 2 && whole; i++)
            whole = write_some(&d[i]);
    }
    for (int i = 0; i < 2 && options.reset; i++)
        setsockopt(d[i].from, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    if (options.tally)
        write_tally(d);
    _exit(0);
}

static int connect_to(const char *where)
{
    char host[256];
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *list;
    const char *colon = strrchr(where, ':');
    int fd;
    if (!colon || (size_t)(colon - where) >= sizeof host)
        return -1;
    memcpy(host, where, (size_t)(colon - where));
    host[colon - where] = '\0';
    if (getaddrinfo(host, colon + 1, &hints, &list) != 0)
        return -1;
    fd = socket(list->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && connect(fd, list->ai_addr, list->ai_addrlen) < 0) {
        close(fd);
        fd = -1;
    }
    freeaddrinfo(list);
    return fd;
}

static int listen_here(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof address;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, len) < 0 || listen(fd, 128) < 0 ||
        getsockname(fd, (struct sockaddr *)&address, &len) < 0)
        die("proxy: cannot listen");
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    return fd;
}

static void read_options(int argc, char **argv)
{
    static const struct option known[] = {
        {"delay", required_argument, NULL, 'd'}, {"strip", required_argument, NULL, 's'},
        {"cut-out", required_argument, NULL, 'o'}, {"cut-in", required_argument, NULL, 'i'},
        {"reset", no_argument, NULL, 'r'}, {"plan", required_argument, NULL, 'p'},
        {"tally", required_argument, NULL, 't'}, {0}};
    int option;
    while ((option = getopt_long(argc, argv, "", known, NULL)) != -1)
        switch (option) {
        case 'd': options.delay = atoi(optarg); break;
        case 'o': options.cut[0] = atoll(optarg); break;
        case 'i': options.cut[1] = atoll(optarg); break;
        case 'r': options.reset = true; break;
        case 'p': options.plan = optarg; break;
        case 't': options.tally = optarg; break;
        case 's':
            if (options.strips < STRIPS) {
                options.strip[options.strips++] = optarg;
                break;
            } /* fall through */
        default: exit(64);
        }
    if (optind + 1 != argc) {
        fputs("usage: proxy [--delay MS] [--strip KEYWORD] [--cut-out N] [--cut-in N] [--reset] [--plan FILE] "
              "[--tally FILE] HOST:PORT\n", stderr);
        exit(64);
    }
}

int main(int argc, char **argv)
{
    int listener;
    read_options(argc, argv);
    signal(SIGCHLD, SIG_IGN);
    listener = listen_here();
    for (;;) {
        int client = accept(listener, NULL, NULL), server;
        if (client < 0)
            continue;
        if (fork() == 0) {
            close(listener);
            if (options.plan)
                read_plan();
            server = connect_to(argv[optind]);
            if (server < 0)
                _exit(1);
            serve(client, server);
        }
        close(client);
    }
}
