/* odmr: On-Demand Mail Relay (RFC 2645), provider and customer.
 *
 * Read odmr.h first; it lists the parts. Then read this file from top to bottom. Parts 1 to 5 are the protocol, in the
 * order of time. There a function comes before the functions that it calls, after their prototypes. Parts 6 to 15
 * support the protocol. Within each of them a function comes after the functions that it calls.
 *
 * A mark such as (7-a) names a requirement of the RFC. RFC2645.txt lists them all, each with the function that keeps it
 * and the test that checks it. The call that sends or reads a line has its mark as an argument, for trace and grep. */

#include "odmr.h"

#include <arpa/inet.h>
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <grp.h>
#include <limits.h>
#include <linux/sockios.h>
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
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <sysexits.h>
#include <syslog.h>
#include <termios.h>
#include <unistd.h>

extern char **environ;

/* ==== 1. The provider: its session, and the three states of sections 5.1, 5.2 and 5.3 ================
 *
 * One function for each state of the RFC, in its order. The function reads commands until one of them leads out of the
 * state. Commands that every state answers alike are in common_command(). As a server the provider needs only EHLO,
 * AUTH, ATRN and QUIT (4-c); it accepts no mail. */

#define BAD_COMMANDS 10          /* after so many the reply is 421 */
#define LAST_WORD 5              /* seconds to send a 421 */

static enum next initial_state(struct session *s);
static enum next authenticated_state(struct session *s);
static void reversed_state(struct session *s);
static bool tls_at_once(struct session *s);
static bool read_command(struct session *s);
static bool command_readable(struct session *s);
static bool command_too_long(const struct session *s);
static void trace_command(struct session *s);
static bool tells_secret(const char *line);
static void common_command(struct session *s);
static void ehlo_command(struct session *s);
static bool starttls_command(struct session *s);
static enum next auth_command(struct session *s);
static void forget_responses(struct session *s);
static enum next atrn_command(struct session *s);
static bool quit_command(struct session *s);
static void send_mail(struct session *s);

/* (4-b): log in, request mail, reverse the roles, and send mail, all on one connection. */
void provider_session(struct session *s)
{
    log_event(s, LOG_INFO, "%s connected", s->peer);
    s->io.wake_fd = s->provider->wake_fd;
    s->io.deadline = now_ms() + (int64_t)s->provider->login_timeout * 1000;
    if ((!s->tls_at_once || tls_at_once(s)) && initial_state(s) == GO_ON &&
        authenticated_state(s) == GO_ON)
        reversed_state(s);
    log_event(s, LOG_INFO, "%s disconnected%s%s", s->peer, s->io.broken ? ": " : "", s->io.broken ? s->io.broken : "");
    s->io.woken |= atomic_load(&s->provider->stopping); /* then stream_close() does not linger */
    stream_close(&s->io);
}

/* 5.1: connected, not authenticated. EHLO, AUTH and QUIT are valid (5.1-a); only AUTH leads on (5-a). */
static enum next initial_state(struct session *s)
{
    enter_state(s, INITIAL);
    reply(s, "5.1", "220 %s on-demand mail relay server ready", s->name);
    for (;;) {
        if (!read_command(s))
            return END;
        if (verb_is(s, "EHLO")) {
            ehlo_command(s);
        } else if (verb_is(s, "AUTH")) {
            enum next got = auth_command(s);
            forget_responses(s);
            if (got != STAY)
                return got;
        } else if (verb_is(s, "STARTTLS")) {
            if (!starttls_command(s))
                return END;
        } else if (verb_is(s, "ATRN")) {
            reply_bad_command(s, "5.2.1-b", "530 Authentication required"); /* even if its syntax is wrong, too */
        } else if (verb_is(s, "QUIT")) {
            if (quit_command(s))
                return END;
        } else {
            common_command(s);
        }
    }
}

/* 5.2: ATRN and QUIT are valid (5.2-a). Only ATRN leads on (5-a). --login-timeout does not limit this state, so the
 * commands other than ATRN are counted. */
static enum next authenticated_state(struct session *s)
{
    enter_state(s, AUTHENTICATED);
    s->io.deadline = 0;
    for (int idle = 0;;) {
        if (idle++ == IDLE_COMMANDS) {
            end_with_421(s, "too many commands without ATRN");
            return END;
        }
        if (!read_command(s))
            return END;
        if (verb_is(s, "ATRN")) {
            idle = 0;
            if (atrn_command(s) == GO_ON)
                return GO_ON;
        } else if (verb_is(s, "EHLO")) {
            ehlo_command(s);
        } else if (verb_is(s, "AUTH")) {
            reply_bad_command(s, "5-a", "503 Already authenticated as %s", s->account->name);
        } else if (verb_is(s, "STARTTLS") && s->tls_context) {
            reply_bad_command(s, NULL, "503 Too late for TLS, or on already");
        } else if (verb_is(s, "QUIT")) {
            if (quit_command(s))
                return END;
        } else {
            common_command(s);
        }
    }
}

/* 5.3: the provider is now the client (5.3-a), and sends the queued mail. Mail that is not sent stays queued. */
static void reversed_state(struct session *s)
{
    enter_state(s, REVERSED);
    s->io.wake_fd = -1; /* at a shutdown the message under way is still sent */
    s->io.waits = 0;
    send_mail(s);
    if (s->first) {
        message_close(s->first);
        free(s->first);
        s->first = NULL;
    }
    backlog_free(&s->backlog);
}

/* --tls-listen: implicit TLS. */
static bool tls_at_once(struct session *s)
{
    SSL *tls = stream_offer_tls(&s->io, s->tls_context, NULL);
    if (!tls)
        stream_break(&s->io, "TLS cannot be set up");
    return tls && stream_start_tls(&s->io, tls, NULL);
}

/* Reads the next command and splits it into the verb in s->line and s->argument (NULL: none). Also replies to lines
 * that are not commands. False: the session is over, and a peer that is still there has been told. */
static bool read_command(struct session *s)
{
    while (s->bad_commands < BAD_COMMANDS) {
        if (atomic_load(&s->provider->stopping)) { /* a client that pipelines without pause causes no wait */
            end_with_421(s, "this server is shutting down");
            return false;
        }
        if (!read_line(s)) {
            stop_waiting(s);
            return false;
        }
        if (s->io.line_cut || command_too_long(s)) {
            trace_line(s, CUSTOMER, NULL, "(a line that is too long)");
            reply_bad_command(s, NULL, "500 Line too long");
        } else {
            trace_command(s);
            if (command_readable(s)) {
                split_command(s);
                return true;
            }
            reply_bad_command(s, NULL, "500 A command consists of printable US-ASCII");
        }
    }
    end_with_421(s, "too many bad commands");
    return false;
}

/* ATRN is answered by its own rules even if its argument has octets that are not printable. They become question marks,
 * which no domain has. */
static bool command_readable(struct session *s)
{
    bool readable = printable(s->line, s->line_len);
    if (readable || strncasecmp(s->line, "ATRN ", 5) != 0)
        return readable;
    for (size_t i = 0; i < s->line_len; i++)
        if (!printable(s->line + i, 1))
            s->line[i] = '?';
    return true;
}

/* RFC 4954, 4: 12288 octets are enough for any AUTH. RFC 5321, 4.5.3.1.4: 512 for other commands, but an ATRN may name
 * many domains. The limits include the line end. */
static bool command_too_long(const struct session *s)
{
    size_t limit = COMMAND_LINE;
    if (strncasecmp(s->line, "AUTH ", 5) == 0)
        limit = AUTH_LINE;
    else if (strncasecmp(s->line, "ATRN ", 5) == 0)
        limit = ATRN_LINE;
    return s->io.line_octets > limit;
}

static void trace_command(struct session *s)
{
    if (tells_secret(s->line))
        trace_line(s, CUSTOMER, NULL, "AUTH PLAIN (response not shown)");
    else
        trace_line(s, CUSTOMER, NULL, "%s", s->line);
}

/* Is this AUTH PLAIN with a response on the same line? The secret is hidden even if the command will be refused. */
static bool tells_secret(const char *line)
{
    if (strncasecmp(line, "AUTH", 4) != 0)
        return false;
    line += 4 + strspn(line + 4, " \t");
    return strncasecmp(line, "PLAIN", 5) == 0 && line[5];
}

/* The commands that every state answers alike. All others get 502 (5.4-a). */
static void common_command(struct session *s)
{
    if (verb_is(s, "NOOP") || (verb_is(s, "RSET") && !s->argument))
        reply(s, NULL, "250 OK");
    else if (verb_is(s, "HELP"))
        reply(s, NULL, "214 On-Demand Mail Relay, RFC 2645: EHLO, AUTH, ATRN, QUIT");
    else if (verb_is(s, "RSET"))
        reply_bad_command(s, NULL, "501 RSET takes no argument");
    else
        reply_bad_command(s, "5.4-a", "502 Command not implemented");
}

void stop_waiting(struct session *s)
{
    if (s->io.timed_out)
        end_with_421(s, s->state == INITIAL ? "not authenticated in time" : "silent for too long");
    else if (s->io.woken)
        end_with_421(s, "this server is shutting down");
}

void end_with_421(struct session *s, const char *why)
{
    if (s->io.broken && !s->io.woken && !s->io.timed_out)
        return;
    s->io.broken = NULL; /* after a time-out or a shutdown the connection still works, so the 421 is sent */
    s->io.deadline = 0;
    s->io.timeout = LAST_WORD;
    s->io.wake_fd = -1;
    reply(s, NULL, "421 %s closing connection: %s", s->name, why);
    stream_end(&s->io);
    stream_break(&s->io, why);
}

/* ==== 2. The provider's commands: EHLO, STARTTLS, AUTH, ATRN, QUIT ===================================
 *
 * These commands protect the mail: they decide which mechanisms are offered on this connection, and which domains the
 * account may request. ATRN is the only command that reads the queue (4-d). */

static bool mechanism_offered(const struct session *s, enum mechanism m);
static bool take_asked_domains(struct session *s);
static bool asked_too_soon(struct session *s);
static void start_interval(struct session *s);
static struct last_atrn *last_atrn_of(const struct provider *p, const char *account);
static enum claim claim_next(struct session *s, struct backlog *b, struct message **claimed);
static void log_unclaimed(const struct session *s, const struct message *m, bool gone_before);
static const char *reason_to_stop(int problem, int before);

/* 5.1.1: EHLO is that of ESMTP (5.1.1-a). The response lists AUTH and ATRN in every state (5.1.1-b). */
static void ehlo_command(struct session *s)
{
    char list[128] = "";
    if (!s->argument || strchr(s->argument, ' ')) {
        reply_bad_command(s, NULL, "501 EHLO takes the name of the host");
        return;
    }
    snprintf(s->peer_name, sizeof s->peer_name, "%s", s->argument);
    s->greeted = true;
    for (enum mechanism m = NO_MECHANISM + 1; m < MECHANISMS; m++)
        if (mechanism_offered(s, m)) {
            strcat(list, " ");
            strcat(list, mechanism_name(m));
        }
    reply(s, "5.1.1-a", "250-%s", s->name);
    reply(s, "5.1.1-b", "250-AUTH%s", list);
    if (s->tls_context && !s->io.tls && s->state == INITIAL)
        reply(s, "RFC 3207", "250-STARTTLS");
    reply(s, "5.1.1-b", "250 ATRN");
}

/* Every provider and every customer have CRAM-MD5 (5.1.2-c), unless the site has disabled it (5.1.2-e). The others are
 * optional (5.1.2-d). PLAIN reveals the secret and SCRAM-PLUS is bound to TLS, so both are offered only over TLS.
 * EXTERNAL is offered only if the client's certificate was verified (5.1.2-f). */
static bool mechanism_offered(const struct session *s, enum mechanism m)
{
    switch (m) {
    case CRAM_MD5:
        return !s->provider->no_cram_md5;
    case SCRAM:
        return true;
    case SCRAM_PLUS:
    case PLAIN:
        return s->io.tls != NULL;
    case EXTERNAL:
        return s->provider->client_ca && certificate_verified(s->io.tls);
    case NO_MECHANISM:
    case MECHANISMS:
        break;
    }
    return false;
}

/* RFC 3207. What the client sent before the handshake is forgotten (4.2): EHLO, its name, and input after STARTTLS.
 * False: the session is over. */
static bool starttls_command(struct session *s)
{
    SSL *tls;
    if (!s->tls_context) {
        reply_bad_command(s, "5.4-a", "502 Command not implemented");
    } else if (s->argument) {
        reply_bad_command(s, NULL, "501 STARTTLS takes no argument");
    } else if (s->io.tls || !s->greeted) {
        reply_bad_command(s, NULL, s->io.tls ? "503 TLS is on already" : "503 EHLO first");
    } else if (!(tls = stream_offer_tls(&s->io, s->tls_context, NULL))) {
        reply_bad_command(s, "RFC 3207", "454 TLS not available just now");
    } else {
        if (stream_discard_input(&s->io))
            log_event(s, LOG_WARNING, "%s sent input after STARTTLS in the clear; it is discarded", s->peer);
        reply(s, "RFC 3207", "220 Ready to start TLS");
        s->greeted = false;
        snprintf(s->peer_name, sizeof s->peer_name, "unknown");
        return stream_start_tls(&s->io, tls, NULL);
    }
    return true;
}

/* AUTH of RFC 4954 (5.1.2-a). GO_ON: authenticated. STAY: the client may try again. END: the session is over. */
static enum next auth_command(struct session *s)
{
    char *initial = s->argument ? strchr(s->argument, ' ') : NULL;
    enum mechanism m;
    if (!s->greeted) {
        reply_bad_command(s, NULL, "503 EHLO first");
        return STAY;
    }
    if (!s->argument) {
        reply_bad_command(s, NULL, "501 AUTH takes the name of a mechanism");
        return STAY;
    }
    if (initial)
        *initial++ = '\0';
    m = mechanism_named(s->argument);
    if (s->provider->require_tls && !s->io.tls) {
        reply_bad_command(s, "5.1.2-b", "538 Encryption required: STARTTLS first");
        return STAY;
    }
    if (m == PLAIN && !s->io.tls && s->tls_context) {
        reply_bad_command(s, "5.1.2-b", "538 Encryption required for this mechanism");
        return STAY;
    }
    if (!mechanism_offered(s, m)) {
        reply_bad_command(s, "5.1.2-b", "504 Mechanism not offered");
        return STAY;
    }
    s->mechanism = m;
    accounts_renew(s); /* cannot fail: the session has no account yet */
    return sasl_serve(s, m, initial);
}

/* Erases the responses, because they may contain a secret, and freed memory is used again. */
static void forget_responses(struct session *s)
{
    OPENSSL_cleanse(s->line, sizeof s->line);
    OPENSSL_cleanse(s->response, sizeof s->response);
    OPENSSL_cleanse(s->io.in, s->io.in_at);
}

bool accounts_renew(struct session *s)
{
    struct provider *p = s->provider;
    struct accounts *old = s->accounts;
    const struct account *account = NULL;
    bool good;
    pthread_mutex_lock(&p->lock);
    if (s->account)
        account = account_find(p->accounts, s->account->name);
    good = !s->account || (account && strcmp(account->secret, s->account->secret) == 0);
    if (good) {
        s->accounts = p->accounts;
        atomic_fetch_add(&s->accounts->users, 1);
        s->account = account;
    }
    pthread_mutex_unlock(&p->lock);
    if (good)
        accounts_release(old);
    return good;
}

/* ---- 5.2.1 ATRN ---- */

/* 5.2.1. GO_ON: the roles must be reversed, and s->backlog and s->first have the mail to send. Only ATRN starts a
 * delivery, never a timer or new mail (4-d). The reply codes are those of section 7 (7-a). */
static enum next atrn_command(struct session *s)
{
    enum claim got;
    bool complete;
    if (s->argument && !domain_list_valid(s->argument)) {
        reply_bad_command(s, "5.2.1-l", "501 ATRN takes domains, with commas and without blanks between them");
        return STAY;
    }
    if (!accounts_renew(s)) {
        log_event(s, LOG_WARNING, "ATRN answered 530: account %s was removed or its secret has changed",
                  s->account->name);
        reply_bad_command(s, "5.2.1-b", "530 Authentication required, for the account has changed");
        return STAY;
    }
    if (!take_asked_domains(s) || asked_too_soon(s)) {
        reply(s, "5.2.1-f", "450 ATRN request refused");
        return STAY;
    }
    s->postponed = "a domain cannot be read"; /* unless claim_next() finds another reason */
    complete = backlog_read(&s->backlog, s, s->provider->queue, s->asked);
    got = claim_next(s, &s->backlog, &s->first);
    if (got == NOTHING && !complete)
        got = BUSY; /* a domain that cannot be read may have mail */
    if (got == CLAIMED) {
        reply(s, "5.2.1-j", "250 OK now reversing the connection");
        return GO_ON;
    }
    backlog_free(&s->backlog);
    if (got == BUSY) {
        log_event(s, LOG_WARNING, "ATRN %s answered 451: %s", s->asked, s->postponed);
        reply(s, "5.2.1-k", "451 Unable to process ATRN request now");
    } else {
        log_event(s, LOG_INFO, "ATRN %s answered 453: no mail", s->asked);
        start_interval(s);
        reply(s, "5.2.1-g", "453 You have no mail");
    }
    return STAY;
}

/* Sets s->asked to the domains of this request (5.2.1-a), each once. If it names none, they are all domains of the
 * account (5.2.1-d). False: one domain without access rejects the whole request (5.2.1-e). */
static bool take_asked_domains(struct session *s)
{
    const char *list = s->argument, *domain;
    size_t len;
    while ((domain = next_domain(&list, &len)))
        if (!domain_in_list(s->account->domains, domain, len)) {
            log_event(s, LOG_WARNING, "ATRN answered 450: account %s has no access to %.*s", s->account->name,
                      (int)len, domain);
            return false;
        }
    s->asked = s->account->domains;
    if (s->argument) {
        snprintf(s->domains, sizeof s->domains, "%s", s->argument);
        tidy_domains(s->domains);
        s->asked = s->domains;
    }
    return true;
}

/* (5.2.1-i): has the account repeated its request too soon? */
static bool asked_too_soon(struct session *s)
{
    struct provider *p = s->provider;
    const struct last_atrn *last;
    bool soon;
    pthread_mutex_lock(&p->lock);
    last = last_atrn_of(p, s->account->name);
    soon = last && now_ms() - last->when < (int64_t)p->interval * 1000;
    pthread_mutex_unlock(&p->lock);
    if (soon)
        log_event(s, LOG_WARNING, "ATRN answered 450: account %s repeated it within --interval %d s", s->account->name,
                  p->interval);
    return soon;
}

/* (5.2.1-i): the interval starts when mail was delivered or the reply was 453. It does not start after a 450, a 451 or
 * a session that delivered nothing. It outlasts the session. */
static void start_interval(struct session *s)
{
    struct provider *p = s->provider;
    const char *name = s->account->name;
    struct last_atrn *last;
    pthread_mutex_lock(&p->lock);
    last = last_atrn_of(p, name);
    if (!last && p->interval > 0 && (last = malloc(sizeof *last + strlen(name) + 1))) {
        strcpy(last->name, name);
        last->next = p->last_atrn;
        p->last_atrn = last;
    }
    if (last)
        last->when = now_ms();
    pthread_mutex_unlock(&p->lock);
}

/* To be called under the lock. Returns NULL if no interval of the account has started. */
static struct last_atrn *last_atrn_of(const struct provider *p, const char *account)
{
    struct last_atrn *last = p->last_atrn;
    while (last && strcmp(last->name, account) != 0)
        last = last->next;
    return last;
}

/* Claims the oldest message that can be sent. CLAIMED: the message is in *claimed. NOTHING: no mail is left, or only
 * held mail. BUSY: the mail that is left is locked by other sessions or cannot be read; the log says why. b->stopped is
 * set if the walk ended before a message that may be claimed later, because the file system is gone or descriptors or
 * memory are short. */
static enum claim claim_next(struct session *s, struct backlog *b, struct message **claimed)
{
    enum claim result = NOTHING;
    struct message *m = malloc(sizeof *m);
    const char *busy = NULL;
    int problem = b->stopped ? EIO : 0; /* of the message before; the log has it already */
    *claimed = NULL;
    b->stopped = NULL;
    if (!m) {
        s->postponed = "out of memory";
        log_event(s, LOG_ERR, "out of memory; the mail stays queued");
        b->stopped = "out of memory";
        return BUSY;
    }
    while (b->next < b->count && !b->stopped) {
        enum claim got = message_claim(m, b->queue, b->list[b->next].path);
        int before = problem;
        problem = m->trouble ? m->problem : 0;
        if (got == CLAIMED) {
            b->next++;
            *claimed = m;
            return CLAIMED;
        }
        if (got == BUSY) {
            s->postponed = m->trouble ? "mail cannot be read" : "mail locked by another session";
            result = BUSY;
        }
        log_unclaimed(s, m, file_system_gone(before));
        if (got == BUSY && !m->trouble)
            busy = m->path;
        b->stopped = reason_to_stop(problem, before);
        b->next += !b->stopped;
        message_close(m);
    }
    free(m);
    if (busy)
        log_event(s, LOG_INFO, "%s skipped: locked by another session", busy);
    return result;
}

/* Logs why this message is not sent, unless another session has claimed it. If the file system is gone, the log says so
 * for one message, not for each. */
static void log_unclaimed(const struct session *s, const struct message *m, bool gone_before)
{
    if (m->held)
        log_event(s, LOG_WARNING, "held %s: %s", m->path, m->held);
    else if (m->trouble && !(gone_before && file_system_gone(m->problem)))
        log_event(s, LOG_WARNING, "%s skipped: %s (%s); it stays queued", m->path, m->trouble, strerror(m->problem));
}

/* If one file cannot be read, it may be a bad sector. If the next one fails too, the disk is gone. */
static const char *reason_to_stop(int problem, int before)
{
    if (problem == ENOTCONN || problem == ESHUTDOWN || (problem == EIO && before == EIO))
        return "the file system of the queue is gone";
    if (short_of_descriptors(problem))
        return "short of file descriptors";
    return problem == ENOMEM ? "out of memory" : NULL;
}

/* QUIT ends each state (5-a, 5.1.3-a). False: it had an argument, so the session goes on. */
static bool quit_command(struct session *s)
{
    if (s->argument) {
        reply_bad_command(s, NULL, "501 QUIT takes no argument");
        return false;
    }
    reply(s, "5.1.3-a", "221 %s closing connection", s->name);
    s->io.said_quit = true;
    stream_flush(&s->io);
    return true;
}

/* ==== 3. The provider as the client: one sender (5.3) ================================================
 *
 * The roles are reversed: the customer greets, and the provider sends the mail. How often the sender waits depends on
 * the extensions that the customer offers:
 *
 *   no extension      the sender waits for the reply to each command;
 *   PIPELINING        MAIL, RCPT and DATA leave together, and so do the end of one message and the start of
 *                     the next: one wait a message (RFC 2920);
 *   CHUNKING too      BDAT needs no go-ahead, so many messages are on their way at once (RFC 3030).
 *
 * The same code does all three. Every command is noted in a FIFO, and each reply is for the oldest command there.
 * may_stay_outstanding() alone decides after which commands the sender waits. Replies that have arrived are taken
 * before the next message is sent, without waiting for more. After the last message, all replies are awaited.
 *
 * Two peers that block cannot deadlock, for this reason. The provider writes without reading, so all replies that it
 * has not read must fit into its receive buffer. Then the customer can always write them, and goes on to read. The
 * kernel says how large this buffer is (reply_window), and no more replies are outstanding than fit, if each is as long
 * as RFC 5321 allows. After a longer reply the sender waits after each command. A customer can still delay the session
 * if it fills the buffer with longer replies before the first of them is read. The time-out then ends the session.
 *
 * RFC 2920 and RFC 3030 depend on the order of replies. When the order can no longer be trusted, the sender breaks the
 * connection and ignores all later replies. */

#define RECIPIENTS_A_TRANSACTION 100 /* RFC 5321, 4.5.3.1.8: what every server must accept */
#define REPLY_MAX 512            /* RFC 5321, 4.5.3.1.5: octets, with its code and CRLF */
#define REPLY_ROOM 665           /* octets that such a reply takes in the receive buffer, with what TLS adds */
#define REPLIES_IN_FLIGHT 320    /* RECEIVE_BUFFER has room for so many */
#define REFUSED_MESSAGES_MAX 10  /* when so many were refused and none was accepted, the session ends */

struct transaction {
    struct message *message;
    size_t first, last;   /* its recipients are message->list[i], first <= i < last */
    size_t accepted;      /* recipients that the customer has accepted */
    unsigned outstanding; /* replies that are still due */
    bool open;            /* its commands are still being written */
    bool behind_end;      /* when MAIL was written, replies to an earlier message were still due */
    bool again;           /* MAIL was refused for that reason, so the same is sent again */
    bool mail_refused;    /* so the replies after it do not count */
    bool go_ahead;        /* DATA was answered with 354 */
    enum verdict verdict; /* of the reply to MAIL, which follows */
    struct reply reply;
};

/* FOR_CONTENT: the lone dot. FOR_BDAT: BDAT with its octets. */
enum expectation { FOR_RSET, FOR_MAIL, FOR_RCPT, FOR_DATA, FOR_CONTENT, FOR_BDAT, FOR_QUIT };

struct expected {
    enum expectation what;
    struct transaction *of;
    struct recipient *recipient;
    uint64_t written; /* octets of the stream up to the end of the command */
};

struct sender {
    struct session *s;
    bool pipelining;            /* offered, and no reply was too long for it */
    bool chunking, eight_bit, utf8, size; /* offered */
    uint64_t size_limit;        /* 0: none */
    size_t mail_max, rcpt_max;  /* RFC 9422: transactions in this session, 0: any number; recipients in each */
    bool unclean;               /* the customer has an open transaction, so RSET is sent before the next */
    bool wait_at_ends;          /* the customer's server takes no command before its reply to the end of a message */
    bool over;                  /* no more is sent in this session; the log says why */
    bool abandoned;             /* recipients without a reply stay queued */
    struct expected fifo[REPLIES_IN_FLIGHT];
    size_t oldest, count, window; /* of the FIFO; no more than window are noted there */
    struct message *again;      /* messages that must be sent again, in order of arrival */
    size_t delivered, deferred, refused; /* recipients, for the log */
    size_t transactions, messages_refused;
    uint64_t octets;
};

static size_t reply_window(const struct session *s);
static bool greet_customer(struct sender *x);
static void read_capabilities(struct sender *x, const struct reply *r);
static size_t limit_of(const char *limits, const char *name, size_t none);
static struct message *next_message(struct sender *x);
static bool send_message(struct sender *x, struct message *m);
static void refuse_beforehand(struct sender *x, struct message *m);
static bool customer_cannot_take(const struct sender *x, const struct message *m, const char *recipient,
                                 struct reply *why);
static bool send_transaction(struct sender *x, struct transaction *t, struct recipient *to);
static struct recipient *next_owed(const struct message *m, size_t *next);
static void send_mail_command(struct sender *x, const struct message *m);
static bool send_data(struct sender *x, struct transaction *t);
static bool send_content(struct sender *x, struct transaction *t, bool dots);
static bool send_bdat(struct sender *x, struct transaction *t);
static bool expect(struct sender *x, enum expectation what, struct transaction *t, struct recipient *to);
static size_t may_stay_outstanding(const struct sender *x, enum expectation what);
static bool take_arrived_replies(struct sender *x);
static bool await_replies(struct sender *x, size_t left);
static bool take_reply(struct sender *x, const struct reply *r);
static const char *last_reply(enum expectation what, int code);
static const char *reply_clause(const struct sender *x);
static void take_mail_reply(struct sender *x, struct transaction *t, const struct reply *r);
static void take_rcpt_reply(struct sender *x, struct transaction *t, struct recipient *to, const struct reply *r);
static void take_content_reply(struct sender *x, struct transaction *t, enum expectation what, const struct reply *r);
static void not_ready(struct sender *x, const struct reply *r);
static enum verdict verdict_of(enum expectation what, const struct reply *r);
static bool about_session(enum expectation what, int code);
static void abandon(struct sender *x);
static void transaction_release(struct sender *x, struct transaction *t);
static void message_release(struct sender *x, struct message *m);
static void message_conclude(struct sender *x, struct message *m);
static bool must_be_sent_again(struct sender *x, struct message *m);
static void count_message(struct sender *x, const struct message *m);
static void note_verdict(struct sender *x, struct message *m, struct recipient *to, enum verdict verdict,
                         const struct reply *r);
__attribute__((format(printf, 2, 3))) static void end_early(struct sender *x, const char *fmt, ...);
static void log_fate(const struct session *s, int priority, const char *fate, const struct message *m,
                     const struct recipient *to, const char *why);

/* ---- The session in this state ---- */

/* The session as the client: the customer's greeting, the mail that ATRN found, oldest first, and QUIT (5-b). A message
 * without a reply stays queued, unchanged. */
static void send_mail(struct session *s)
{
    struct sender x = {.s = s, .rcpt_max = RECIPIENTS_A_TRANSACTION, .window = reply_window(s)};
    bool good = greet_customer(&x);
    struct message *m;
    while (good && !x.over && !atomic_load(&s->provider->stopping) && (m = next_message(&x)))
        good = send_message(&x, m) && take_arrived_replies(&x);

    /* QUIT is sent after the queue has been updated with all replies. */
    good = await_replies(&x, 0) && !s->io.broken;
    if (s->messages > 0)
        start_interval(s);
    if (good) {
        command(s, "5-b", "QUIT");
        expect(&x, FOR_QUIT, NULL, NULL);
    }
    abandon(&x);

    log_event(s, LOG_INFO,
              "%s: %zu message%s, %llu octets, recipients: %zu delivered, %zu deferred, %zu refused; %lu wait%s",
              s->account->name, s->messages, plural(s->messages), (unsigned long long)x.octets, x.delivered, x.deferred,
              x.refused, s->io.waits, plural(s->io.waits));
    if (s->io.broken)
        log_event(s, LOG_WARNING, "the reversed session ended early: %s; what is not delivered stays queued",
                  s->io.broken);
}

/* How many replies our receive buffer holds while we do not read. Linux reports twice the size that was set, because
 * half is for its own overhead (socket(7)). */
static size_t reply_window(const struct session *s)
{
    int size = 0;
    size_t window;
    getsockopt(s->io.fd, SOL_SOCKET, SO_RCVBUF, &size, &(socklen_t){sizeof size});
    window = (size_t)size / 2 / REPLY_ROOM;
    return window < 1 ? 1 : window < REPLIES_IN_FLIGHT ? window : REPLIES_IN_FLIGHT;
}

/* 5.3-b: the customer greets. 5.3-c: the provider says EHLO or, if EHLO is refused with 5xx, HELO. False: the
 * connection is broken, or the customer takes no mail now. */
static bool greet_customer(struct sender *x)
{
    struct session *s = x->s;
    struct reply r;
    if (!read_reply(s, "5.3-b", &r))
        return false;
    if (r.code == 220) {
        command(s, "5.3-c", "EHLO %s", s->name);
        if (!read_ehlo_reply(s, "5.3-a", &r))
            return false;
        if (r.code < 300)
            read_capabilities(x, &r);
        if (r.code >= 500) {
            command(s, "5.3-c", "HELO %s", s->name);
            if (!read_reply(s, "5.3-a", &r))
                return false;
        }
        if (r.code < 300)
            return true;
    }
    not_ready(x, &r);
    return false;
}

static void read_capabilities(struct sender *x, const struct reply *r)
{
    char size[REPLY_KEPT], limits[REPLY_KEPT];
    reply_parameters(r, "LIMITS", limits, sizeof limits);
    x->pipelining = reply_keyword(r, "PIPELINING") != NULL;
    x->chunking = x->pipelining && reply_keyword(r, "CHUNKING") != NULL;
    x->eight_bit = reply_keyword(r, "8BITMIME") != NULL;
    x->utf8 = reply_keyword(r, "SMTPUTF8") != NULL;
    x->size = reply_parameters(r, "SIZE", size, sizeof size);
    x->size_limit = isdigit((unsigned char)*size) ? strtoull(size, NULL, 10) : 0;
    x->mail_max = limit_of(limits, "MAILMAX=", 0);
    if (limit_of(limits, "RCPTMAX=", x->rcpt_max) < x->rcpt_max)
        x->rcpt_max = limit_of(limits, "RCPTMAX=", x->rcpt_max);
}

/* RFC 9422: returns the number after NAME= in the parameters of LIMITS, or `none` if there is no such number. */
static size_t limit_of(const char *limits, const char *name, size_t none)
{
    size_t len, before = strlen(name);
    const char *word;
    while ((word = next_word(&limits, &len))) {
        size_t limit = strncasecmp(word, name, before) == 0 ? strtoull(word + before, NULL, 10) : 0;
        if (limit > 0 && len <= before + 6 && strspn(word + before, "0123456789") == len - before)
            return limit;
    }
    return none;
}

/* Returns the next message to send: the one that was claimed for ATRN, then the others. A message that must be sent
 * again comes first, after all outstanding replies. If the walk through the queue was stopped (see claim_next),
 * outstanding replies are awaited, which frees descriptors and memory, and the same message is tried once more. If the
 * walk still cannot go on, the connection is broken, because QUIT would say that all was sent. Returns NULL when no
 * message is left or the connection is broken. */
static struct message *next_message(struct sender *x)
{
    struct session *s = x->s;
    struct message *m = s->first;
    s->first = NULL;
    if (!m && !x->again)
        claim_next(s, &s->backlog, &m);
    if (m || !await_replies(x, 0))
        return m;
    if (x->again) {
        m = x->again;
        x->again = m->next;
    } else if (s->backlog.stopped) {
        claim_next(s, &s->backlog, &m);
        if (!m && s->backlog.stopped)
            stream_break(&s->io, s->backlog.stopped);
    }
    return m;
}

/* ---- Commands ---- */

/* Sends the whole message, in as many transactions as its recipients need. */
static bool send_message(struct sender *x, struct message *m)
{
    struct recipient *to;
    size_t next = 0;
    bool connected = true;
    m->holders = 1;
    m->again = false;
    m->next = NULL;
    refuse_beforehand(x, m);
    while (connected && !x->over && (to = next_owed(m, &next))) {
        struct transaction *t = calloc(1, sizeof *t);
        if (!t) {
            stream_break(&x->s->io, "out of memory");
            connected = false;
            break;
        }
        *t = (struct transaction){.message = m, .first = next - 1, .last = next, .open = true};
        m->holders++;
        connected = send_transaction(x, t, to);
        next = t->last;
        t->open = false;
        transaction_release(x, t);
        if (x->mail_max > 0 && x->transactions == x->mail_max)
            end_early(x, "the customer takes no more than %zu transactions a session (RFC 9422)", x->mail_max);
    }
    message_forget_top(m);
    message_release(x, m);
    return connected;
}

static void refuse_beforehand(struct sender *x, struct message *m)
{
    struct reply why;
    for (size_t i = 0; i < m->recipients; i++)
        if (m->list[i].fate == OWED && customer_cannot_take(x, m, m->list[i].address, &why))
            note_verdict(x, m, &m->list[i], REFUSED, &why);
}

/* True, and why: under the standards this customer cannot take the message, so it is returned. A header with octets
 * over 127 needs only 8BITMIME, as in other mail servers; an address in UTF-8 needs SMTPUTF8. */
static bool customer_cannot_take(const struct sender *x, const struct message *m, const char *recipient,
                                 struct reply *why)
{
    why->code = 0;
    if (x->size_limit > 0 && m->wire_size > x->size_limit)
        snprintf(why->text, sizeof why->text, "5.3.4 The message has %llu octets; the recipient's server takes %llu",
                 (unsigned long long)m->wire_size, (unsigned long long)x->size_limit);
    else if (!x->utf8 && !(ascii(m->sender) && ascii(recipient)))
        snprintf(why->text, sizeof why->text, "5.6.7 An address is in UTF-8, and the recipient's server does not take "
                                              "that (SMTPUTF8)");
    else if (!x->eight_bit && m->eight_bit)
        snprintf(why->text, sizeof why->text, "5.6.3 The content has 8-bit octets, and the recipient's server does not "
                                              "take them (8BITMIME)");
    else
        return false;
    return true;
}

/* Sends one transaction: MAIL, RCPT for the next recipients, as many as the customer takes at once, and the content. */
static bool send_transaction(struct sender *x, struct transaction *t, struct recipient *to)
{
    struct message *m = t->message;
    size_t n = 1;
    t->behind_end = x->count > 0; /* before RSET, which ends no message */
    if (x->unclean && x->count == 0) {
        command(x->s, "5.3-c", "RSET");
        if (!expect(x, FOR_RSET, NULL, NULL))
            return false;
    }
    send_mail_command(x, m);
    x->transactions++;
    if (!expect(x, FOR_MAIL, t, NULL))
        return false;
    do {
        if (!t->mail_refused) {
            command(x->s, "5.3-c", "RCPT TO:<%s>", to->address);
            if (!expect(x, FOR_RCPT, t, to))
                return false;
        } else if (!t->again) {
            note_verdict(x, m, to, t->verdict, &t->reply);
        }
    } while (n++ < x->rcpt_max && (to = next_owed(m, &t->last)));
    if (x->count == 0 && (t->mail_refused || t->accepted == 0))
        return true; /* all commands are answered, and no recipient was accepted: no content */
    return x->chunking ? send_bdat(x, t) : send_data(x, t);
}

/* Returns the next recipient that is OWED the message, from entry *next on, and sets *next to the entry after it. */
static struct recipient *next_owed(const struct message *m, size_t *next)
{
    while (*next < m->recipients)
        if (m->list[(*next)++].fate == OWED)
            return &m->list[*next - 1];
    return NULL;
}

/* With the parameters that the customer offers and the message needs (RFC 1870, RFC 6152, RFC 6531). */
static void send_mail_command(struct sender *x, const struct message *m)
{
    char size[32] = "";
    if (x->size)
        snprintf(size, sizeof size, " SIZE=%llu", (unsigned long long)m->wire_size);
    command(x->s, "5.3-c", "MAIL FROM:<%s>%s%s%s", m->sender, size,
              m->eight_bit && x->eight_bit ? " BODY=8BITMIME" : "",
              (m->utf8_header || m->utf8_address) && x->utf8 ? " SMTPUTF8" : "");
}

static bool send_data(struct sender *x, struct transaction *t)
{
    command(x->s, "5.3-c", "DATA");
    if (!expect(x, FOR_DATA, t, NULL))
        return false;
    if (!t->go_ahead)
        return true;
    /* RFC 2920, 3.1: a 354 must be honoured even if every RCPT failed. Then the message is empty. */
    if (t->accepted > 0 && !send_content(x, t, true))
        return false;
    command(x->s, "4-e", ".");
    return expect(x, FOR_CONTENT, t, NULL);
}

static bool send_content(struct sender *x, struct transaction *t, bool dots)
{
    if (!message_send(t->message, &x->s->io, dots)) {
        stream_break(&x->s->io, "a queued file became unreadable or was changed while it was sent");
        return false;
    }
    trace_line(x->s, PROVIDER, "5.3-c", "... %llu octets of message ...", (unsigned long long)t->message->wire_size);
    return true;
}

static bool send_bdat(struct sender *x, struct transaction *t)
{
    command(x->s, "RFC 3030", "BDAT %llu LAST", (unsigned long long)t->message->wire_size);
    return send_content(x, t, false) && expect(x, FOR_BDAT, t, NULL);
}

/* ---- Replies: each is for the oldest command in the FIFO ---- */

/* Notes that the command just written will be answered, and waits if may_stay_outstanding() says so. */
static bool expect(struct sender *x, enum expectation what, struct transaction *t, struct recipient *to)
{
    struct stream *io = &x->s->io;
    x->fifo[(x->oldest + x->count++) % REPLIES_IN_FLIGHT] = (struct expected){what, t, to, io->gone + io->out_end};
    if (t)
        t->outstanding++;
    return await_replies(x, may_stay_outstanding(x, what));
}

/* How many replies may be outstanding after this command. Without PIPELINING, or after a reply that was too long, none.
 * With it, DATA must be the last of its group (RFC 2920, 3.1), so all replies are awaited there. Otherwise we write on
 * until the window is full, and then wait until half of it is free. */
static size_t may_stay_outstanding(const struct sender *x, enum expectation what)
{
    if (!x->pipelining || what == FOR_DATA || what == FOR_QUIT)
        return 0;
    if (x->wait_at_ends && (what == FOR_CONTENT || what == FOR_BDAT))
        return 0;
    return x->count < x->window ? x->count : x->window / 2;
}

/* Takes the replies that have arrived, without waiting. So accepted mail leaves the queue soon, and a provider that is
 * killed causes few second copies. A reply that arrives before its command has left is not taken. */
static bool take_arrived_replies(struct sender *x)
{
    struct reply r;
    while (x->count > 0 && x->fifo[x->oldest].written <= x->s->io.gone && reply_arrived(x->s))
        if (!read_arrived_reply(x->s, reply_clause(x), &r) || !take_reply(x, &r))
            return false;
    return true;
}

static bool await_replies(struct sender *x, size_t left)
{
    struct reply r;
    while (x->count > left)
        if (!read_reply(x->s, reply_clause(x), &r) || !take_reply(x, &r))
            return false;
    return true;
}

/* Takes a reply for the oldest command. False: the connection is broken. */
static bool take_reply(struct sender *x, const struct reply *r)
{
    struct expected e = x->fifo[x->oldest];
    const char *last = last_reply(e.what, r->code);
    if (last) {
        stream_break(&x->s->io, last);
        stream_end_input(&x->s->io);
        return false;
    }
    x->oldest = (x->oldest + 1) % REPLIES_IN_FLIGHT;
    x->count--;
    if (r->octets > REPLY_MAX)
        x->pipelining = false;
    switch (e.what) {
    case FOR_MAIL:
        take_mail_reply(x, e.of, r);
        break;
    case FOR_RCPT:
        take_rcpt_reply(x, e.of, e.recipient, r);
        break;
    case FOR_DATA:
        e.of->go_ahead = r->code == 354;
        if (!e.of->go_ahead)
            take_content_reply(x, e.of, FOR_DATA, r);
        break;
    case FOR_CONTENT:
    case FOR_BDAT:
        take_content_reply(x, e.of, e.what, r);
        break;
    case FOR_RSET:
        x->unclean = false;
        break;
    case FOR_QUIT:
        break;
    }
    if (e.of) {
        e.of->outstanding--;
        transaction_release(x, e.of);
    }
    return true;
}

/* After some replies no other can be trusted. A server that does not know BDAT reads the content as commands, and its
 * replies to those would be taken for verdicts on mail. A 2xx in the place of 354 answers another command. 421 is the
 * final reply of a server that closes (RFC 5321, 3.8). Returns the reason, or NULL for any other reply. */
static const char *last_reply(enum expectation what, int code)
{
    if (what == FOR_BDAT && (code == 500 || code == 502 || code == 504))
        return "the customer's server does not know BDAT, though CHUNKING was offered";
    if (what == FOR_DATA && code < 300)
        return "the customer's server answers DATA with 2xx in the place of 354";
    return code == 421 ? "the customer closes the service (421)" : NULL;
}

/* The requirement of RFC 2645 that the reply to the oldest command belongs to. */
static const char *reply_clause(const struct sender *x)
{
    static const char *const clause[] = {
        [FOR_RSET] = "5.3-c", [FOR_MAIL] = "5.3-c,4-e", [FOR_RCPT] = "5.3-c,4-e", [FOR_DATA] = "5.3-c,4-e",
        [FOR_CONTENT] = "4-e", [FOR_BDAT] = "4-e", [FOR_QUIT] = "5-b",
    };
    return clause[x->fifo[x->oldest].what];
}

/* RFC 2920, 3.1, lets MAIL follow the end of a message at once. Some servers answer 503 to each command that arrives
 * before their reply to that end. Then the sender waits there from now on, and sends the refused message again. */
static void take_mail_reply(struct sender *x, struct transaction *t, const struct reply *r)
{
    t->verdict = verdict_of(FOR_MAIL, r);
    t->mail_refused = t->verdict != DELIVERED;
    t->reply = *r;
    x->unclean = !t->mail_refused;
    if (r->code == 503 && t->behind_end) {
        t->again = t->message->again = true;
        if (!x->wait_at_ends)
            log_event(x->s, LOG_NOTICE, "the customer's server answered 503 to a pipelined MAIL; from now on the "
                                        "sender waits for the reply to each message");
        x->wait_at_ends = true;
    } else if (about_session(FOR_MAIL, r->code)) {
        not_ready(x, r);
    }
}

static void take_rcpt_reply(struct sender *x, struct transaction *t, struct recipient *to, const struct reply *r)
{
    if (t->again)
        return;
    if (t->mail_refused) {
        note_verdict(x, t->message, to, t->verdict, &t->reply);
    } else if (reply_verdict(r) == DELIVERED) {
        to->fate = ACCEPTED;
        t->accepted++;
    } else {
        note_verdict(x, t->message, to, verdict_of(FOR_RCPT, r), r);
    }
}

/* The reply to DATA if it is not 354, otherwise the reply to the last octet. With a 2xx to the last octet, the
 * responsibility passes to the customer (RFC 5321, 4.2.5). If the connection is lost right before that reply arrives,
 * the customer has the message, and it is sent again. It is never lost. */
static void take_content_reply(struct sender *x, struct transaction *t, enum expectation what, const struct reply *r)
{
    enum verdict verdict = verdict_of(what, r);
    for (size_t i = t->first; i < t->last; i++)
        if (t->message->list[i].fate == ACCEPTED)
            note_verdict(x, t->message, &t->message->list[i], verdict, r);
    x->unclean = verdict != DELIVERED;
    if (t->accepted > 0 && about_session(what, r->code))
        not_ready(x, r);
}

static void not_ready(struct sender *x, const struct reply *r)
{
    char text[REFUSAL_SIZE];
    join_lines(r, text, sizeof text);
    end_early(x, "the customer's server is not ready for mail: %d %s", r->code, text);
}

static enum verdict verdict_of(enum expectation what, const struct reply *r)
{
    return about_session(what, r->code) ? DEFERRED : reply_verdict(r);
}

/* Is this a 5xx about the session, not about this mail? The server wants TLS or a log-in first, does not know the
 * command, or is not ready. Then the mail stays queued. To RCPT, 503 is about the order of commands, and 552 means "too
 * many recipients" in old servers (RFC 5321, 4.5.3.1.10). The reply to the last octet of DATA's content is always a
 * verdict on the message. */
static bool about_session(enum expectation what, int code)
{
    static const int codes[] = {500, 502, 503, 504, 521, 530, 534, 535, 538};
    if (what == FOR_RCPT)
        return code == 503 || code == 552;
    for (size_t i = 0; i < sizeof codes / sizeof *codes; i++)
        if (code == codes[i])
            return what == FOR_MAIL || what == FOR_DATA || what == FOR_BDAT;
    return false;
}

/* The session is over. Replies that arrived before the connection broke still count. The others will not arrive, so
 * their recipients stay queued. */
static void abandon(struct sender *x)
{
    take_arrived_replies(x);
    x->abandoned = true;
    while (x->count > 0) {
        struct expected e = x->fifo[x->oldest];
        x->oldest = (x->oldest + 1) % REPLIES_IN_FLIGHT;
        x->count--;
        if (e.of) {
            e.of->outstanding--;
            transaction_release(x, e.of);
        }
    }
    while (x->again) {
        struct message *m = x->again;
        x->again = m->next;
        message_conclude(x, m);
    }
}

/* ---- The fate of a message after its replies ---- */

static void transaction_release(struct sender *x, struct transaction *t)
{
    if (!t || t->open || t->outstanding > 0)
        return;
    message_release(x, t->message);
    free(t);
}

static void message_release(struct sender *x, struct message *m)
{
    if (--m->holders == 0)
        message_conclude(x, m);
}

/* All transactions of this message have their replies, or the session is over. */
static void message_conclude(struct sender *x, struct message *m)
{
    struct session *s = x->s;
    if (must_be_sent_again(x, m))
        return;
    for (size_t i = 0; i < m->recipients; i++) {
        struct recipient *r = &m->list[i];
        if (r->fate == ACCEPTED || (r->fate == OWED && (s->io.broken || x->abandoned))) {
            r->fate = DEFERRED;
            x->deferred++;
            log_fate(s, LOG_INFO, "deferred", m, r, s->io.broken ? s->io.broken : "the session ended before a reply");
        }
    }
    count_message(x, m);
    if (!update_queue(s->provider, s, m))
        backlog_skip_box(&s->backlog, m->path);
    message_close(m);
    free(m);
}

/* True: the message is now the last in x->again. */
static bool must_be_sent_again(struct sender *x, struct message *m)
{
    struct message **at = &x->again;
    size_t next = 0;
    if (!m->again || x->abandoned || !next_owed(m, &next))
        return false;
    while (*at)
        at = &(*at)->next;
    *at = m;
    return true;
}

static void count_message(struct sender *x, const struct message *m)
{
    bool taken = false, refused = false;
    for (size_t i = 0; i < m->recipients; i++) {
        taken |= m->list[i].fate == DELIVERED;
        refused |= m->list[i].fate == REFUSED && !m->list[i].reason->ours;
    }
    x->s->messages += taken;
    x->octets += taken ? m->wire_size : 0;
    x->messages_refused += refused && !taken;
    if (x->s->messages == 0 && x->messages_refused == REFUSED_MESSAGES_MAX)
        end_early(x, "the customer's server refused %d messages and accepted none", REFUSED_MESSAGES_MAX);
}

/* Notes and logs the verdict of this reply for a recipient. Code 0: the reason is ours, not the customer's. */
static void note_verdict(struct sender *x, struct message *m, struct recipient *to, enum verdict verdict,
                         const struct reply *r)
{
    char text[REFUSAL_SIZE - 4], why[REFUSAL_SIZE];
    join_lines(r, text, sizeof text);
    if (verdict == REFUSED && r->code && x->messages_refused >= REFUSED_MESSAGES_MAX && x->s->messages == 0)
        verdict = DEFERRED; /* if a server refuses everything, no more of the queue is returned */
    if (verdict == REFUSED && !(to->reason = message_reason(m, r->code, text)))
        verdict = DEFERRED; /* because a notice needs the reason */
    to->fate = verdict;
    x->delivered += verdict == DELIVERED;
    x->deferred += verdict == DEFERRED;
    x->refused += verdict == REFUSED;
    if (r->code)
        snprintf(why, sizeof why, "%d %s", r->code, text);
    else
        memcpy(why, text, sizeof text);
    log_fate(x->s, LOG_INFO,
             verdict == DELIVERED ? "delivered" : verdict == DEFERRED ? "deferred" : "refused", m, to, why);
}

/* Ends the session early, with QUIT. Outstanding replies are still awaited; the other messages stay queued. */
__attribute__((format(printf, 2, 3))) static void end_early(struct sender *x, const char *fmt, ...)
{
    char why[LOG_LINE];
    va_list args;
    va_start(args, fmt);
    vsnprintf(why, sizeof why, fmt, args);
    va_end(args);
    if (!x->over)
        log_event(x->s, LOG_WARNING, "%s; the rest of the mail stays queued, and the session ends", why);
    x->over = true;
}

/* One line for each recipient's fate, so that an administrator can find mail by sender, recipient or Message-ID. */
static void log_fate(const struct session *s, int priority, const char *fate, const struct message *m,
                     const struct recipient *to, const char *why)
{
    log_event(s, priority, "%s to=<%s> from=<%s> message-id=%s file=%s: %s", fate, to->address, m->sender,
              *m->id ? m->id : "none", m->path, why);
}

/* ==== 4. The customer as the client: from the greeting to ATRN (5.1, 5.2) ============================
 *
 * Greeting, EHLO, AUTH and ATRN; each reply is checked. Then the roles are reversed. The result is an exit code of
 * sysexits(3), because a script that polls has to distinguish mail, no mail, a temporary and a permanent error. */

#define ATRN_TIMEOUT 600         /* 5.2.1-c: seconds; at least ten minutes */
#define REPLY_TEXT 512           /* octets of a reply in the log */
#define EXIT_NO_MAIL 1 /* the reply to ATRN was 453, or 250 and then no mail */

/* After SIGTERM the customer receives the message under way, then replies 421. An octet in the pipe ends a wait for a
 * command. A second signal ends the program at once. */
static int stop_pipe[2] = {-1, -1};
static volatile sig_atomic_t customer_stops;

static int session_with_provider(const struct customer *c, struct receiver *receiver);
static int client_dialogue(struct session *s, const struct customer *c);
static int client_ehlo(struct session *s, struct reply *r);
static int client_starttls(struct session *s, const struct customer *c, struct reply *r);
static int client_tls(struct session *s, const struct customer *c);
static int client_authenticate(struct session *s, const struct customer *c, struct reply *r);
static enum mechanism choose_mechanism(const struct session *s, const struct customer *c, const struct reply *r);
static bool mechanism_usable(const struct session *s, const struct customer *c, enum mechanism m);
static int client_atrn(struct session *s, const struct customer *c, struct reply *r);

int customer_session(const struct customer *c)
{
    struct receiver receiver = {.session = NULL};
    int code = EX_OK;
    if (c->smtp || c->exec)
        code = reach_receiver(c, &receiver, "no ATRN is sent");
    if (code == EX_OK)
        code = session_with_provider(c, &receiver);
    leave_receiver(c, &receiver);
    return code;
}

static int session_with_provider(const struct customer *c, struct receiver *receiver)
{
    struct session *s;
    int code, fd = connect_to(c->provider, ODMR_PORT, c->timeout, &code);
    if (fd < 0)
        return code;
    s = must_alloc(session_new(fd, CUSTOMER, c->timeout, c->name, c->trace));
    s->quiet = c->quiet;
    s->stepwise = c->stepwise;
    s->progress = !c->quiet && !c->trace && isatty(STDERR_FILENO);
    s->io.wake_fd = stop_pipe[0];
    code = client_dialogue(s, c);
    if (code == EX_OK)
        code = receiver->session ? hand_session_on(s, c, receiver) : take_mail_ourselves(s, c);
    stream_close(&s->io);
    free(s);
    return code;
}

/* From the greeting to the reply to ATRN (4-b): the transcript of section 6, from the customer's side. */
static int client_dialogue(struct session *s, const struct customer *c)
{
    struct reply r;
    int code;
    enter_state(s, INITIAL);
    if (c->tls && (code = client_tls(s, c)) != EX_OK)
        return code;
    if (!read_reply(s, "5.1", &r))
        return exit_code_lost(s);
    if (r.code != 220)
        return exit_code_refused(s, "connecting", &r, EX_UNAVAILABLE);
    code = client_ehlo(s, &r);
    if (code == EX_OK)
        code = client_starttls(s, c, &r);
    if (code == EX_OK && !reply_keyword(&r, "ATRN")) {
        log_event(s, LOG_ERR, "%s does not offer ATRN", s->peer);
        code = EX_UNAVAILABLE;
    }
    if (code == EX_OK)
        code = client_authenticate(s, c, &r);
    if (code == EX_OK) {
        enter_state(s, AUTHENTICATED);
        code = client_atrn(s, c, &r);
    }
    if (code != EX_OK && !s->io.broken) {
        command(s, "5.1.3-a", "QUIT");
        read_reply(s, "5.1.3-a", &r);
    }
    return code;
}

static int client_ehlo(struct session *s, struct reply *r)
{
    command(s, "5.1.1-a", "EHLO %s", s->name);
    if (!read_ehlo_reply(s, "5.1.1-a", r))
        return exit_code_lost(s);
    return r->code == 250 ? EX_OK : exit_code_refused(s, "EHLO", r, EX_UNAVAILABLE);
}

/* RFC 3207: STARTTLS is used whenever it is offered. What the provider said before is forgotten, so EHLO is sent again.
 * Without the offer, which an attacker may have removed, the session goes on in the clear unless --require-tls. */
static int client_starttls(struct session *s, const struct customer *c, struct reply *r)
{
    int code;
    if (s->io.tls)
        return EX_OK;
    if (!reply_keyword(r, "STARTTLS")) {
        if (!c->require_tls)
            return EX_OK;
        log_event(s, LOG_ERR, "%s does not offer STARTTLS, which --require-tls needs; no credentials sent", s->peer);
        return EX_UNAVAILABLE;
    }
    command(s, "RFC 3207", "STARTTLS");
    if (!read_reply(s, "RFC 3207", r))
        return exit_code_lost(s);
    if (r->code != 220)
        return exit_code_refused(s, "STARTTLS", r, EX_UNAVAILABLE);
    if (stream_discard_input(&s->io))
        log_event(s, LOG_WARNING, "%s sent input after its reply to STARTTLS in the clear; it is discarded", s->peer);
    code = client_tls(s, c);
    return code == EX_OK ? client_ehlo(s, r) : code;
}

/* The handshake. Without --insecure the certificate must be valid, and must be for the provider's host. */
static int client_tls(struct session *s, const struct customer *c)
{
    char host[256], port[32];
    SSL *tls;
    if (!split_host_port(c->provider, ODMR_PORT, host, sizeof host, port, sizeof port) ||
        !(tls = stream_offer_tls(&s->io, c->tls_context, host))) {
        log_event(s, LOG_ERR, "TLS with %s failed: OpenSSL cannot set it up; no credentials sent", s->peer);
        return EX_SOFTWARE;
    }
    if (stream_start_tls(&s->io, tls, host))
        return EX_OK;
    log_event(s, LOG_ERR, "TLS with %s failed: %s; no credentials sent", s->peer, s->io.broken);
    if (SSL_get_verify_result(tls) != X509_V_OK && !c->insecure)
        return EX_NOPERM;
    return s->io.tls_failed ? EX_PROTOCOL : EX_TEMPFAIL;
}

/* ---- AUTH: which mechanism ---- */

static int client_authenticate(struct session *s, const struct customer *c, struct reply *r)
{
    enum mechanism m = choose_mechanism(s, c, r);
    char list[REPLY_KEPT];
    if (m != NO_MECHANISM)
        return sasl_prove(s, c, m, r);
    reply_parameters(r, "AUTH", list, sizeof list);
    log_event(s, LOG_ERR, "no usable SASL mechanism: %s offers %s%s%s", s->peer, *list ? list : "none",
              c->mechanism ? "; wanted: " : "", mechanism_name(c->mechanism));
    return EX_NOPERM;
}

/* The strongest mechanism that the provider offers and the customer can use, or the one that --mechanism names. */
static enum mechanism choose_mechanism(const struct session *s, const struct customer *c, const struct reply *r)
{
    static const enum mechanism by_strength[] = {SCRAM_PLUS, SCRAM, EXTERNAL, CRAM_MD5, PLAIN};
    for (size_t i = 0; i < sizeof by_strength / sizeof *by_strength; i++) {
        enum mechanism m = by_strength[i];
        if ((c->mechanism == NO_MECHANISM || c->mechanism == m) && mechanism_usable(s, c, m) &&
            reply_offers(r, "AUTH", mechanism_name(m)))
            return m;
    }
    return NO_MECHANISM;
}

/* Whether the customer has what the mechanism needs, and the connection allows it. */
static bool mechanism_usable(const struct session *s, const struct customer *c, enum mechanism m)
{
    unsigned char binding[EVP_MAX_MD_SIZE];
    switch (m) {
    case SCRAM_PLUS:
        return c->secret && channel_binding(s->io.tls, false, "tls-server-end-point", binding) > 0;
    case EXTERNAL:
        return c->cert && s->io.tls && (!c->secret || c->mechanism == EXTERNAL);
    case PLAIN:
        return c->secret && certificate_verified(s->io.tls);
    case CRAM_MD5:
    case SCRAM:
        return c->secret != NULL;
    case NO_MECHANISM:
    case MECHANISMS:
        break;
    }
    return false;
}

/* ---- ATRN, and the exit codes ---- */

static int client_atrn(struct session *s, const struct customer *c, struct reply *r)
{
    int timeout = s->io.timeout;
    char text[REPLY_TEXT];
    if (timeout < ATRN_TIMEOUT) /* (5.2.1-c) */
        s->io.timeout = ATRN_TIMEOUT;
    command(s, *c->domains ? "5.2.1-a" : "5.2.1-d", "ATRN%s%s", *c->domains ? " " : "", c->domains);
    if (!read_reply(s, "5.2.1", r))
        return exit_code_lost(s);
    s->io.timeout = timeout;
    switch (r->code) {
    case 250:
        return EX_OK;
    case 453:
        join_lines(r, text, sizeof text);
        if (!s->quiet)
            log_event(s, LOG_INFO, "%s: %d %s", s->peer, r->code, text);
        return EXIT_NO_MAIL;
    case 530:
        return exit_code_refused(s, "ATRN", r, EX_NOPERM);
    default:
        return exit_code_refused(s, "ATRN", r, EX_UNAVAILABLE);
    }
}

/* A provider without mail may answer ATRN with 250 and say QUIT right after EHLO (5.2.1-h). This is not an error. */
int session_outcome(struct session *s, bool ended, size_t messages, size_t unwritten)
{
    if (!ended)
        return exit_code_lost(s);
    if (unwritten > 0)
        return EX_CANTCREAT;
    return messages > 0 ? EX_OK : EXIT_NO_MAIL;
}

int exit_code_lost(const struct session *s)
{
    log_event(s, LOG_ERR, "%s: %s", s->peer, s->io.broken ? s->io.broken : "the connection was lost");
    return s->protocol_broken ? EX_PROTOCOL : EX_TEMPFAIL;
}

int exit_code_refused(const struct session *s, const char *command, const struct reply *r, int permanent)
{
    char text[REPLY_TEXT];
    join_lines(r, text, sizeof text);
    log_event(s, LOG_ERR, "%s: the reply to %s was %d %s", s->peer, command, r->code, text);
    return r->code >= 500 ? permanent : r->code >= 400 ? EX_TEMPFAIL : EX_PROTOCOL;
}

static void stop_customer(int number)
{
    int problem = errno;
    (void)number;
    customer_stops = 1;
    if (write(stop_pipe[1], "", 1) < 0)
        _exit(EX_TEMPFAIL);
    errno = problem;
}

/* ==== 5. The customer as the server: SMTP into a Maildir (5.3) =======================================
 *
 * A small SMTP server that trusts no input. When it answers a message with 250, the message is on disk. */

#define BAD_COMMANDS_SERVER 100  /* the customer allows more than the provider does (BAD_COMMANDS) */
#define RECIPIENTS_MAX 1000      /* that the customer accepts for a message */
#define DOMAINS_A_MESSAGE 32     /* of these recipients, at most */
#define TRACE_FIELDS_MAX 100     /* RFC 5321, 6.3: more Received fields mean a loop */
#define DELIVERIES_MAX 96 /* files that go to disk together */
#define ANSWERS_MAX 512   /* answers that wait for these files */
#define STORED_SIZE 512   /* octets of the domains that the summary names */

/* The content of the message under way. */
struct content {
    bool under_way;
    bool dots;  /* DATA: a lone dot ends it. BDAT: dots mean nothing */
    bool ended; /* the lone dot has arrived */
    bool bare;  /* the content has a CR or LF by itself */
    bool after_cr, begun, in_body;
    enum { AT_LINE_START, AFTER_DOT, IN_TEXT } state;
    size_t column, trace_fields;
    char name[32]; /* the start of this header line, to count Received fields */
    struct delivery deliveries[DOMAINS_A_MESSAGE];
    size_t files; /* 0: the files cannot be opened, or there is no recipient */
};

/* An answer that waits for its turn. */
struct answer {
    char text[128];
    const char *clause;
    size_t files; /* of the waiting deliveries, so many decide the answer; 0: it is `text` */
};

struct smtp_server {
    struct session *s;
    const struct customer *c;
    bool greeted, esmtp; /* EHLO or HELO was received; it was EHLO */
    bool in_mail, utf8;  /* MAIL was accepted; it had SMTPUTF8 */
    bool done;           /* the session has a proper end */
    const char *gave_up; /* why no more commands are accepted; NULL: they are */
    char sender[MAILBOX_MAX + 2];
    char *recipients[RECIPIENTS_MAX], mailboxes[RECIPIENTS_MAX][MAILBOX_MAX + 2];
    size_t count, domains; /* of the recipients; of their domains */
    struct content content;

    struct answer answers[ANSWERS_MAX];
    struct delivery waiting[DELIVERIES_MAX]; /* the files of these answers */
    size_t answer_count, waiting_count;

    size_t messages, unwritten; /* stored; answered with 452 */
    uint64_t octets;            /* of content */
    char stored[STORED_SIZE];   /* a,b,c: the domains that mail was stored for; then ... if others did not fit */
    unsigned idle;              /* commands in a row without a recipient or content */
};

static void receive_mail(struct smtp_server *server);
static void receive_command(struct smtp_server *server);
static bool too_idle(struct smtp_server *server);
static void bad_command(struct smtp_server *server, const char *reply);
static void hello_command(struct smtp_server *server);
static void mail_command(struct smtp_server *server);
static void rcpt_command(struct smtp_server *server);
static const char *recipient_refusal(const struct smtp_server *server, const char *mailbox, const char *parameters);
static void data_command(struct smtp_server *server);
static void bdat_command(struct smtp_server *server);
static const char *parse_path(const char *argument, const char *keyword, char *mailbox, size_t size);
static bool mail_parameters_known(const char *parameters);
static void complete_postmaster(struct smtp_server *server, char *mailbox, size_t size);
static bool has_recipient_in(const struct smtp_server *server, const char *domain);
static void forget_transaction(struct smtp_server *server);
static void begin_content(struct smtp_server *server, bool dots);
static void write_received_field(const struct smtp_server *server, FILE *file);
static const char *name_for_received(const char *name);
static bool read_content(struct smtp_server *server, uint64_t left);
static size_t content_take(struct content *c, const char *data, size_t len);
static void content_text(struct content *c, const char *data, size_t len);
static void content_line_end(struct content *c);
static void content_write(struct content *c, const char *data, size_t len);
static void end_content(struct smtp_server *server);
__attribute__((format(printf, 3, 4)))
static void answer(struct smtp_server *server, const char *clause, const char *fmt, ...);
static void answer_when_stored(struct smtp_server *server);
static void before_reading(struct smtp_server *server, bool (*arrived)(struct stream *));
static void store_then_answer(struct smtp_server *server);
static const char *report_unwritten(struct smtp_server *server, const struct delivery *d);

int take_mail_ourselves(struct session *s, const struct customer *c)
{
    struct smtp_server *server = must_alloc(calloc(1, sizeof *server));
    char what[STORED_SIZE + 16] = "received";
    int code;
    server->s = s;
    server->c = c;
    for_each_domain(c->queue, clean_domain, NULL);
    receive_mail(server);
    code = session_outcome(s, server->done, server->messages, server->unwritten);
    if (!*c->domains && *server->stored)
        snprintf(what, sizeof what, "received for %s", server->stored);
    show_summary(s, what, server->messages, server->octets);
    free(server);
    return code;
}

/* 5.3: the customer is now the server (5.3-a). It sends a greeting (5.3-b), and then answers commands until QUIT. */
static void receive_mail(struct smtp_server *server)
{
    struct session *s = server->s;
    enter_state(s, REVERSED);
    answer(server, "5.3-b", "220 %s ready to receive email", s->name);
    while (!server->done && !server->gave_up) {
        bool between_messages = !server->in_mail && !server->content.under_way;
        if (customer_stops && between_messages) {
            store_then_answer(server);
            server->done = true;
            end_with_421(s, "this server is shutting down");
            break;
        }

        s->io.wake_fd = between_messages ? stop_pipe[0] : -1;
        before_reading(server, stream_has_line);
        if (!read_line(s)) {
            if (s->io.woken)
                continue;
            break;
        }
        if (s->io.line_cut || s->line_len != strlen(s->line)) {
            trace_line(s, PROVIDER, NULL, "(a line that is too long, or has a NUL octet)");
            bad_command(server, "500 5.5.2 Not a command");
            continue;
        }
        trace_line(s, PROVIDER, NULL, "%s", s->line);
        split_command(s);
        receive_command(server);
    }

    if (!s->io.broken)
        store_then_answer(server);
    deliveries_discard(server->waiting, server->waiting_count); /* not stored, so not answered with 250 */
    forget_transaction(server);
    stream_flush(&s->io);
    if (server->gave_up) {
        s->protocol_broken = true;
        stream_break(&s->io, server->gave_up);
    }
}

/* Answers one command of the provider. */
static void receive_command(struct smtp_server *server)
{
    struct session *s = server->s;
    if (too_idle(server)) {
        server->gave_up = "the provider sent too many commands without mail";
        answer(server, NULL, "421 4.5.2 Too many commands without mail, closing connection");
    } else if (verb_is(s, "BDAT")) {
        bdat_command(server);
    } else if (server->content.under_way && !verb_is(s, "RSET") && !verb_is(s, "QUIT")) {
        answer(server, NULL, "503 5.5.1 BDAT with LAST first");
    } else if (verb_is(s, "EHLO") || verb_is(s, "HELO")) {
        hello_command(server);
    } else if (verb_is(s, "MAIL")) {
        mail_command(server);
    } else if (verb_is(s, "RCPT")) {
        rcpt_command(server);
    } else if (verb_is(s, "DATA")) {
        data_command(server);
    } else if (verb_is(s, "RSET")) {
        forget_transaction(server);
        answer(server, NULL, "250 2.0.0 OK");
    } else if (verb_is(s, "NOOP")) {
        answer(server, NULL, "250 2.0.0 OK");
    } else if (verb_is(s, "VRFY")) {
        answer(server, NULL, "252 2.5.0 Send it and see");
    } else if (verb_is(s, "QUIT")) {
        answer(server, "5-b", "221 2.0.0 %s closing connection", s->name);
        s->io.said_quit = server->done = true;
    } else {
        bad_command(server, "502 5.5.1 Command not implemented");
    }
}

/* Counts commands in a row without a recipient or content. Octets of content reset the count in read_content(). */
static bool too_idle(struct smtp_server *server)
{
    if (server->in_mail && verb_is(server->s, "RCPT"))
        server->idle = 0;
    return !verb_is(server->s, "QUIT") && ++server->idle >= IDLE_COMMANDS;
}

/* After BAD_COMMANDS_SERVER bad commands the reply is 421. */
static void bad_command(struct smtp_server *server, const char *reply)
{
    if (++server->s->bad_commands < BAD_COMMANDS_SERVER) {
        answer(server, NULL, "%s", reply);
        return;
    }
    server->gave_up = "the provider sent too many bad commands";
    answer(server, NULL, "421 4.5.2 Too many of them, closing connection");
}

/* ---- Commands ---- */

/* EHLO, HELO. A new extension also needs its name in keyword_clause(), words in the ladder's notes and, if it has a
 * parameter of MAIL, a line in mail_parameters_known(). */
static void hello_command(struct smtp_server *server)
{
    struct session *s = server->s;
    if (!s->argument || !printable(s->argument, strlen(s->argument)) || strchr(s->argument, ' ')) {
        answer(server, NULL, "501 5.5.4 That is not the name of a host");
        return;
    }
    forget_transaction(server);
    snprintf(s->peer_name, sizeof s->peer_name, "%s", s->argument);
    server->greeted = true;
    server->esmtp = verb_is(s, "EHLO");
    if (!server->esmtp) {
        answer(server, "5.3-a", "250 %s", s->name);
        return;
    }

    answer(server, "5.3-a", "250-%s", s->name);
    if (server->c->offer != OFFER_SIZE)
        answer(server, "RFC 2920", "250-PIPELINING");
    if (server->c->offer == OFFER_ALL) {
        answer(server, "RFC 6152", "250-8BITMIME");
        answer(server, "RFC 6531", "250-SMTPUTF8");
        answer(server, "RFC 3030", "250-CHUNKING");
        answer(server, "RFC 9422", "250-LIMITS RCPTMAX=%d", RECIPIENTS_MAX);
        answer(server, "RFC 2034", "250-ENHANCEDSTATUSCODES");
    }
    answer(server, "RFC 1870", "250 SIZE"); /* the only extension in section 6 of the RFC */
}

static void mail_command(struct smtp_server *server)
{
    char mailbox[MAILBOX_MAX + 2];
    const char *parameters = parse_path(server->s->argument, "FROM:", mailbox, sizeof mailbox);
    if (!server->greeted)
        answer(server, NULL, "503 5.5.1 EHLO or HELO first");
    else if (server->in_mail)
        answer(server, NULL, "503 5.5.1 One message at a time");
    else if (!parameters || !sender_valid(mailbox))
        answer(server, "4-e", "501 5.1.7 Not a reverse-path");
    else if (!mail_parameters_known(parameters))
        answer(server, "4-e", "555 5.5.4 Parameter not known");
    else {
        memcpy(server->sender, mailbox, strlen(mailbox) + 1);
        server->in_mail = true;
        server->utf8 = list_has(parameters, "SMTPUTF8");
        answer(server, "5.3-c", "250 2.1.0 OK");
    }
}

static void rcpt_command(struct smtp_server *server)
{
    char mailbox[MAILBOX_MAX + 2];
    const char *parameters = parse_path(server->s->argument, "TO:", mailbox, sizeof mailbox), *refusal;
    bool another; /* the first recipient in this domain */
    if (!server->in_mail) {
        answer(server, NULL, "503 5.5.1 MAIL first");
        return;
    }
    if (parameters && strcasecmp(mailbox, "postmaster") == 0)
        complete_postmaster(server, mailbox, sizeof mailbox);
    refusal = recipient_refusal(server, parameters ? mailbox : "", parameters);
    if (refusal) {
        answer(server, "4-e", "%s", refusal);
        return;
    }

    another = !has_recipient_in(server, mailbox_domain(mailbox));
    if (server->count == RECIPIENTS_MAX || (another && server->domains == DOMAINS_A_MESSAGE)) {
        answer(server, "4-e", "452 4.5.3 Too many recipients");
        return;
    }
    server->recipients[server->count] = strcpy(server->mailboxes[server->count], mailbox);
    server->count++;
    server->domains += another;
    answer(server, "5.3-c", "250 2.1.5 OK, recipient accepted");
}

/* Returns the reply that refuses this recipient, or NULL if the recipient is accepted. */
static const char *recipient_refusal(const struct smtp_server *server, const char *mailbox, const char *parameters)
{
    const struct customer *c = server->c;
    const char *domain = mailbox_domain(mailbox);
    if (strcasecmp(mailbox, "postmaster") == 0)
        return "450 4.7.1 Not known yet which domain's postmaster is meant";
    if (!recipient_valid(mailbox))
        return "501 5.1.3 Not a mailbox";
    if (*c->domains ? !domain_in_list(c->domains, domain, strlen(domain)) : !domain_valid(domain, strlen(domain))) {
        log_event(server->s, LOG_WARNING, "the provider sent mail for %s, whose domain ATRN did not request or cannot "
                                          "name; answered 450", mailbox);
        return "450 4.7.1 Not a domain that was asked for"; /* 5xx would bounce this mail */
    }
    if (*parameters != '\0')
        return "555 5.5.4 Parameter not known";
    if (c->unknown_mailbox && strcasecmp(mailbox, c->unknown_mailbox) == 0)
        return "550 5.1.1 Nobody of that name here";
    return NULL;
}

static void data_command(struct smtp_server *server)
{
    uint64_t before = server->octets;
    if (server->count == 0) {
        answer(server, NULL, "503 5.5.1 RCPT first");
        return;
    }
    begin_content(server, true);
    answer(server, "5.3-c", "354 The message, then a dot on a line by itself");
    if (!read_content(server, UINT64_MAX))
        return;
    trace_line(server->s, PROVIDER, "5.3-c", "... %llu octets of message ...",
               (unsigned long long)(server->octets - before - LONE_DOT));
    trace_line(server->s, PROVIDER, "4-e", ".");
    end_content(server);
}

/* RFC 3030: the octets follow in any case, so they are read before the answer, even if BDAT is refused. */
static void bdat_command(struct smtp_server *server)
{
    struct session *s = server->s;
    char *end = NULL;
    uint64_t octets = s->argument && isdigit((unsigned char)*s->argument) ? strtoull(s->argument, &end, 10) : 0;
    bool last = end && strcasecmp(end, " LAST") == 0;
    if (!end || (!last && *end != '\0') || octets > INT64_MAX) {
        answer(server, NULL, "501 5.5.4 BDAT takes a number of octets, and LAST");
        server->gave_up = "the provider sent BDAT without a size"; /* its octets would be taken for commands */
        return;
    }

    if (!server->content.under_way)
        begin_content(server, false);
    trace_line(s, PROVIDER, "5.3-c", "... %llu octets of message ...", (unsigned long long)octets);
    if (!read_content(server, octets))
        return;

    if (server->count == 0) {
        answer(server, NULL, "503 5.5.1 RCPT first");
        server->content.under_way = false;
    } else if (!last) {
        answer(server, NULL, "250 2.0.0 OK, go on");
    } else {
        end_content(server);
    }
}

/* Reads `FROM:<path> parameters`. RFC 5321 forbids a blank before the bracket, but RFC 2645's own example has it (6-a).
 * A source route is dropped, as RFC 5321 (4.1.1.3) allows. Returns the parameters, or NULL if the syntax is wrong. */
static const char *parse_path(const char *argument, const char *keyword, char *mailbox, size_t size)
{
    size_t n = strlen(keyword);
    const char *p = argument ? argument : "", *end;
    bool quoted = false;
    if (strncasecmp(p, keyword, n) != 0)
        return NULL;
    p += n;
    p += strspn(p, " ");
    if (*p++ != '<')
        return NULL;
    if (*p == '@' && strchr(p, ':'))
        p = strchr(p, ':') + 1;

    for (end = p; *end && (quoted || *end != '>'); end++) {
        if (quoted && *end == '\\' && end[1])
            end++;
        else if (*end == '"')
            quoted = !quoted;
    }
    if (*end != '>' || (end[1] != ' ' && end[1] != '\0') || (size_t)(end - p) >= size)
        return NULL;
    memcpy(mailbox, p, (size_t)(end - p));
    mailbox[end - p] = '\0';
    return end + 1;
}

/* Are these parameters of MAIL that our EHLO response offers? Any other is refused (RFC 5321, 4.1.1.11). */
static bool mail_parameters_known(const char *parameters)
{
    size_t len;
    const char *word;
    while ((word = next_word(&parameters, &len))) {
        bool known = (len > 5 && strncasecmp(word, "SIZE=", 5) == 0 && strspn(word + 5, "0123456789") == len - 5) ||
                     (len == 9 && strncasecmp(word, "BODY=7BIT", 9) == 0) ||
                     (len == 13 && strncasecmp(word, "BODY=8BITMIME", 13) == 0) ||
                     (len == 8 && strncasecmp(word, "SMTPUTF8", 8) == 0);
        if (!known)
            return false;
    }
    return true;
}

/* RFC 5321, 4.5.1: postmaster needs no domain. The mailbox is in the first domain of ATRN or, after a bare ATRN, in the
 * first domain that mail was stored for. */
static void complete_postmaster(struct smtp_server *server, char *mailbox, size_t size)
{
    const char *list = server->c->domains, *domain;
    size_t len;
    if (!*list) {
        store_then_answer(server);
        list = server->stored;
    }
    if (*list && (domain = next_domain(&list, &len)))
        snprintf(mailbox, size, "postmaster@%.*s", (int)len, domain);
}

static bool has_recipient_in(const struct smtp_server *server, const char *domain)
{
    for (size_t i = 0; i < server->count; i++)
        if (strcasecmp(mailbox_domain(server->recipients[i]), domain) == 0)
            return true;
    return false;
}

static void forget_transaction(struct smtp_server *server)
{
    deliveries_discard(server->content.deliveries, server->content.files);
    server->content.files = 0;
    server->content.under_way = false;
    server->count = server->domains = 0;
    server->in_mail = false;
}

/* ---- The content of a message ----
 *
 * Line ends become LF, and the dots that DATA added are removed. Only CRLF ends a line, because an attacker can use a
 * bare CR or LF to hide an end of message inside a message (RFC 5321, 2.3.8 and 4.1.1.4). */

/* Opens the files. If too many files are open, those that wait for the disk are stored first. */
static void begin_content(struct smtp_server *server, bool dots)
{
    struct content *c = &server->content;
    *c = (struct content){.under_way = true, .dots = dots};
    c->files = deliveries_open(c->deliveries, server->c->queue, server->sender, server->recipients, server->count);
    if (c->files == 0 && server->waiting_count > 0 && short_of_descriptors(c->deliveries->problem)) {
        store_then_answer(server);
        c->files = deliveries_open(c->deliveries, server->c->queue, server->sender, server->recipients, server->count);
    }
    for (size_t i = 0; i < c->files; i++)
        write_received_field(server, c->deliveries[i].file);
}

/* From which peer, by which host, how (a keyword of RFC 3848 or RFC 6531) and when (RFC 5321, 4.4). */
static void write_received_field(const struct smtp_server *server, FILE *file)
{
    const struct session *s = server->s;
    fprintf(file, "Received: from %s (%s)\n\tby %s with %s%s (odmr, RFC 2645);\n", name_for_received(s->peer_name),
            s->peer, s->name, server->utf8 ? "UTF8SMTP" : server->esmtp ? "ESMTP" : "SMTP",
            server->esmtp && s->io.tls ? "S" : "");
    write_date(file, "\t", time(NULL));
}

/* Returns the name from EHLO, or "unknown" if it could be other syntax in the field, for example a comment. */
static const char *name_for_received(const char *name)
{
    size_t literal = name[0] == '[' ? 1 + strspn(name + 1, "0123456789abcdefABCDEFIPv.:") : 0;
    bool fit = literal ? strcmp(name + literal, "]") == 0
                       : isalnum((unsigned char)name[0]) && name[strspn(name, "abcdefghijklmnopqrstuvwxyz"
                                                                     "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-")] == '\0';
    return fit ? name : "unknown";
}

/* Reads so many octets of content, or up to the lone dot. False: the connection is lost. */
static bool read_content(struct smtp_server *server, uint64_t left)
{
    struct session *s = server->s;
    struct content *c = &server->content;
    s->io.wake_fd = -1;
    while (left > 0 && !c->ended) {
        const char *data;
        size_t len;
        before_reading(server, stream_ready);
        if (!stream_peek(&s->io, &data, &len)) {
            stream_end_input(&s->io); /* what comes later would be content, not a command */
            return false;
        }
        len = content_take(c, data, len < left ? len : (size_t)left);
        stream_skip(&s->io, len);
        left -= len;
        server->octets += len;
        server->idle = 0;
        show_progress(s, server->messages, server->octets);
    }
    return true;
}

/* Takes content from the peer's octets, none after the lone dot. Returns the number of octets that were taken. */
static size_t content_take(struct content *c, const char *data, size_t len)
{
    size_t i = 0;
    while (i < len && !c->ended) {
        bool cr = data[i] == '\r', lf = data[i] == '\n';
        if (c->after_cr != lf) { /* a CR without LF, or an LF without CR */
            c->bare = true;
            c->state = IN_TEXT;
        }

        if (c->after_cr && lf) {
            c->ended = c->state == AFTER_DOT;
            if (!c->ended)
                content_line_end(c);
            c->state = AT_LINE_START;
            i++;
        } else if (cr || lf) {
            c->state = c->state == AT_LINE_START ? IN_TEXT : c->state;
            i++;
        } else {
            bool dot = c->dots && c->state == AT_LINE_START && data[i] == '.'; /* is removed (RFC 5321, 4.5.2) */
            size_t start = i + dot;
            for (i = start; i < len && data[i] != '\r' && data[i] != '\n';)
                i++;
            c->state = dot && i == start ? AFTER_DOT : IN_TEXT;
            content_text(c, data + start, i - start);
        }
        c->after_cr = cr;
    }
    return i;
}

/* Text of one line, without its end. A first line that starts with a blank would continue our Received field, so an
 * empty line is put before it. */
static void content_text(struct content *c, const char *data, size_t len)
{
    if (!c->begun && len > 0 && (*data == ' ' || *data == '\t')) {
        c->in_body = true;
        content_write(c, "\n", 1);
    }
    c->begun |= len > 0;
    if (!c->in_body && c->column < sizeof c->name - 1) {
        size_t part = sizeof c->name - 1 - c->column;
        memcpy(c->name + c->column, data, len < part ? len : part);
    }
    c->column += len;
    content_write(c, data, len);
}

/* Counts Received fields. Blanks are allowed before the colon (RFC 5322, 4.5). */
static void content_line_end(struct content *c)
{
    c->name[c->column < sizeof c->name ? c->column : sizeof c->name - 1] = '\0';
    if (!c->in_body && strncasecmp(c->name, "Received", 8) == 0 && c->name[8 + strspn(c->name + 8, " \t")] == ':')
        c->trace_fields++;
    c->begun = true;
    if (c->column == 0)
        c->in_body = true;
    c->column = 0;
    content_write(c, "\n", 1);
}

static void content_write(struct content *c, const char *data, size_t len)
{
    for (size_t i = 0; i < c->files; i++)
        fwrite(data, 1, len, c->deliveries[i].file);
}

/* After the content, the message is refused, or it is answered when it is on disk (4-e). If the disk is full, its files
 * are removed at once, which makes room for others. */
static void end_content(struct smtp_server *server)
{
    struct content *c = &server->content;
    if (!c->dots && c->state != AT_LINE_START) { /* BDAT may end without a line end, a file must not */
        c->bare |= c->after_cr;
        content_line_end(c);
    }

    if (c->bare)
        answer(server, "4-e", "550 5.6.0 A CR or LF by itself is no line end; message refused");
    else if (c->trace_fields > TRACE_FIELDS_MAX)
        answer(server, "4-e", "554 5.4.6 Too many hops");
    else if (deliveries_written(c->deliveries, c->files))
        answer_when_stored(server);
    else
        answer(server, "4-e", "%s", report_unwritten(server, c->deliveries));
    forget_transaction(server);
}

/* ==== 5. The customer as the server: answers that wait for the disk ==================================
 *
 * A 250 to the last octet of a message says that the message is on disk (RFC 5321, 6.1). Writing takes time, and a
 * provider that pipelines has sent more meanwhile. So the server reads on as long as there is something to read. The
 * answer to a message and all answers after it wait in a list, in their order. Before the server would have to wait for
 * the provider, all messages received so far go to disk together, and then their answers are sent. If the connection is
 * lost before that, the messages are discarded. The provider has no answer, keeps them, and sends them again.
 *
 * answer() gives a reply in its turn. answer_when_stored() gives the reply to the message under way. */

static void answer_stored(struct smtp_server *server, struct delivery *d, size_t files);
static void note_domain(struct smtp_server *server, const char *domain);

static void answer(struct smtp_server *server, const char *clause, const char *fmt, ...)
{
    struct answer *a;
    char text[COMMAND_LINE];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);

    if (server->answer_count == ANSWERS_MAX || strlen(text) >= sizeof a->text)
        store_then_answer(server);
    if (server->answer_count == 0) {
        reply(server->s, clause, "%s", text);
        return;
    }
    a = &server->answers[server->answer_count++];
    memcpy(a->text, text, strlen(text) + 1);
    a->clause = clause;
    a->files = 0;
}

static void answer_when_stored(struct smtp_server *server)
{
    struct content *c = &server->content;
    if (server->answer_count == ANSWERS_MAX || server->waiting_count + c->files > DELIVERIES_MAX)
        store_then_answer(server);
    memcpy(server->waiting + server->waiting_count, c->deliveries, c->files * sizeof *c->deliveries);
    server->waiting_count += c->files;
    server->answers[server->answer_count++].files = c->files;
    c->files = 0;
}

/* To be called before each read, because the provider may be waiting for one of these answers, even when it has sent
 * half a command. After the end of the input it no longer waits. */
static void before_reading(struct smtp_server *server, bool (*arrived)(struct stream *))
{
    if (server->answer_count > 0 && !arrived(&server->s->io) && !server->s->io.ended)
        store_then_answer(server);
}

static void store_then_answer(struct smtp_server *server)
{
    struct delivery *d = server->waiting;
    deliveries_store(d, server->waiting_count);
    for (size_t i = 0; i < server->answer_count; i++) {
        const struct answer *a = &server->answers[i];
        if (a->files == 0)
            reply(server->s, a->clause, "%s", a->text);
        else
            answer_stored(server, d, a->files);
        d += a->files;
    }
    server->answer_count = server->waiting_count = 0;
}

static void answer_stored(struct smtp_server *server, struct delivery *d, size_t files)
{
    if (d->problem) {
        deliveries_discard(d, files);
        reply(server->s, "4-e", "%s", report_unwritten(server, d));
        return;
    }
    for (size_t i = 0; i < files; i++)
        note_domain(server, d[i].domain);
    server->messages++;
    reply(server->s, "4-e", "250 2.0.0 OK, message stored");
}

static void note_domain(struct smtp_server *server, const char *domain)
{
    char *stored = server->stored;
    size_t used = strlen(stored);
    if (domain_in_list(stored, domain, strlen(domain)) || domain_in_list(stored, "...", 3))
        return;
    if (used + strlen(domain) + sizeof ",,..." > sizeof server->stored)
        domain = "...";
    snprintf(stored + used, sizeof server->stored - used, "%s%s", used ? "," : "", domain);
}

/* Logs why a message cannot be stored, and counts it. Returns the reply. */
static const char *report_unwritten(struct smtp_server *server, const struct delivery *d)
{
    log_event(server->s, LOG_ERR, "cannot write the message (%s); answered 452, the provider keeps it",
              strerror(d->problem));
    server->unwritten++;
    return "452 4.3.1 Cannot write the message now";
}

/* ==== 6. SASL: each mechanism once ===================================================================
 *
 * AUTH of RFC 4954 carries a mechanism's messages in base64, as challenges (334) and responses:
 *
 *     the customer, the client                           the provider, the server
 *
 *     AUTH MECHANISM [initial response]  ------------->
 *                                        <-------------  334 challenge
 *     response                           ------------->     (as often as the mechanism needs it)
 *                                        <-------------  235, or 535
 *
 * The initial response "=" is an empty one. The response "*" cancels the exchange, and the reply is 501. For each
 * mechanism this part has its exchange, what both halves need, the server's half and the client's half. A new one needs
 * these two functions, a name in odmr.h, a row in the table, a case in mechanism_offered() and in mechanism_usable(),
 * and a rank in choose_mechanism() (8-b). If it sends the secret, auth_command() must refuse it in the clear, and the
 * trace must hide it (tells_secret, hide_response). If it needs another algorithm, fetch_algorithms() must fetch it. */

#define AUTH_FAILURES 3          /* after so many the reply is 421 */
#define AUTH_FAILURE_MS 1000     /* from the last response to the reply that it failed */
#define CHALLENGE_MAX 1024
#define NONCE_MAX 512            /* the client's half of a SCRAM nonce */
#define SCRAM_ITERATIONS_LEAST 4096
#define SCRAM_ITERATIONS_MOST 1000000 /* more would be a denial of service */
#define NOBODYS_SECRET "a secret that no account has, for names that no account has"

static enum next serve_cram_md5(struct session *s, enum mechanism m, const char *initial);
static enum next serve_plain(struct session *s, enum mechanism m, const char *initial);
static enum next serve_external(struct session *s, enum mechanism m, const char *initial);
static enum next serve_scram(struct session *s, enum mechanism m, const char *initial);
static int prove_cram_md5(struct session *s, const struct customer *c, enum mechanism m, struct reply *r);
static int prove_plain(struct session *s, const struct customer *c, enum mechanism m, struct reply *r);
static int prove_external(struct session *s, const struct customer *c, enum mechanism m, struct reply *r);
static int prove_scram(struct session *s, const struct customer *c, enum mechanism m, struct reply *r);

static const struct {
    const char *name;
    enum next (*serve)(struct session *s, enum mechanism m, const char *initial);
    int (*prove)(struct session *s, const struct customer *c, enum mechanism m, struct reply *r);
} mechanisms[MECHANISMS] = {
    [NO_MECHANISM] = {"", NULL, NULL},
    [CRAM_MD5] = {"CRAM-MD5", serve_cram_md5, prove_cram_md5},
    [SCRAM] = {"SCRAM-SHA-256", serve_scram, prove_scram},
    [SCRAM_PLUS] = {"SCRAM-SHA-256-PLUS", serve_scram, prove_scram},
    [EXTERNAL] = {"EXTERNAL", serve_external, prove_external},
    [PLAIN] = {"PLAIN", serve_plain, prove_plain},
};

const char *mechanism_name(enum mechanism m)
{
    return mechanisms[m].name;
}

enum mechanism mechanism_named(const char *name)
{
    enum mechanism m = MECHANISMS - 1;
    while (m > NO_MECHANISM && strcasecmp(name, mechanisms[m].name) != 0)
        m--;
    return m;
}

enum next sasl_serve(struct session *s, enum mechanism m, const char *initial)
{
    return mechanisms[m].serve(s, m, initial);
}

int sasl_prove(struct session *s, const struct customer *c, enum mechanism m, struct reply *r)
{
    return mechanisms[m].prove(s, c, m, r);
}

/* ---- Base64, by OpenSSL; what OpenSSL tolerates (white space, padding anywhere) is refused first ---- */

size_t base64_encode(char *out, const void *data, size_t len)
{
    return (size_t)EVP_EncodeBlock((unsigned char *)out, data, (int)len);
}

/* Returns the length without the NUL that ends out, or -1 unless text is strict base64 that fits. */
static ssize_t base64_decode(char *out, size_t size, const char *text)
{
    size_t len = strlen(text);
    size_t body = strspn(text, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/");
    size_t padding = strspn(text + body, "=");
    if (len % 4 != 0 || body + padding != len || padding > 2 || len / 4 * 3 >= size)
        return -1;
    if (EVP_DecodeBlock((unsigned char *)out, (const unsigned char *)text, (int)len) < 0)
        return -1;
    len = len / 4 * 3 - padding;
    out[len] = '\0';
    return (ssize_t)len;
}

/* ---- The server's steps that all mechanisms share ---- */

/* Replies to a failed exchange: the secret is wrong (name: whose), or the customer cancelled or sent a bad response.
 * The reply leaves a second after the last response, however long the check took, so a client cannot ask for the work
 * of a challenge without limit. The third failure ends the session. fail2ban needs the address before the name in the
 * log. */
static enum next exchange_failed(struct session *s, const char *name, const char *text)
{
    struct pollfd wake = {.fd = s->io.wake_fd, .events = POLLIN};
    int64_t left = s->responded + AUTH_FAILURE_MS - now_ms();
    char whose[MAILBOX_MAX] = "";
    if (name)
        quote(whose, sizeof whose, name);
    s->auth_failures++;
    log_event(s, LOG_WARNING, "authentication failed from %s%s%s: %s%s%s, attempt %d of %d", s->peer,
              name ? " for " : "", whose, mechanism_name(s->mechanism), name ? "" : ", ", name ? "" : text + 4,
              s->auth_failures, AUTH_FAILURES);
    poll(&wake, 1, left > 0 ? (int)left : 0);
    reply(s, "5.1.2-b", "%s", text);
    if (s->auth_failures < AUTH_FAILURES)
        return STAY;
    end_with_421(s, "too many failed authentications");
    return END;
}

/* A wrong secret and an unknown name have the same reply. */
static enum next auth_failed(struct session *s, const char *name)
{
    return exchange_failed(s, name, "535 Authentication failed");
}

static enum next auth_unavailable(struct session *s)
{
    log_event(s, LOG_ERR, "AUTH answered 454: OpenSSL cannot compute the digests");
    reply(s, "5.1.2-b", "454 Temporary authentication failure");
    return STAY;
}

static enum next auth_succeeded(struct session *s, const struct account *account, enum mechanism m)
{
    s->account = account;
    if (!accounts_renew(s)) { /* SIGHUP arrived after the challenge */
        s->account = NULL;
        return auth_failed(s, account->name);
    }
    account = s->account;
    reply(s, "5.1.2-b", "235 now authenticated as %s", account->name);
    log_event(s, LOG_INFO, "authenticated as %s (%s, %s%s%s)", account->name, mechanism_name(m),
              s->io.tls ? SSL_get_version(s->io.tls) : "in the clear", s->io.tls ? " " : "",
              s->io.tls ? SSL_get_cipher_name(s->io.tls) : "");
    return GO_ON; /* only now is the session authenticated (5.1.2-b) */
}

/* Decodes a response into s->response. False: it is not base64. */
static bool decode_response(struct session *s, const char *text)
{
    s->response_len = base64_decode(s->response, sizeof s->response, text);
    return s->response_len >= 0;
}

/* One turn of an exchange: sends our challenge and reads the response. GO_ON: it is in s->response. STAY: the customer
 * cancelled, or sent no base64, and has its 501. */
static enum next sasl_turn(struct session *s, const char *challenge)
{
    char encoded[BASE64_SIZE(CHALLENGE_MAX) + 1];
    base64_encode(encoded, challenge, strlen(challenge));
    reply(s, "5.1.2-a", "334 %s", encoded);
    if (!read_line(s)) {
        stop_waiting(s);
        return END;
    }
    s->responded = now_ms();
    if (s->io.line_cut || s->io.line_octets > AUTH_LINE) {
        trace_line(s, CUSTOMER, "5.1.2-a", "(a line that is too long)");
        return exchange_failed(s, NULL, "500 Line too long");
    }
    trace_line(s, CUSTOMER, "5.1.2-a", "%s", s->hide_response ? "(response not shown)" : s->line);
    if (strcmp(s->line, "*") == 0)
        return exchange_failed(s, NULL, "501 Authentication cancelled");
    if (s->line_len != strlen(s->line) || !decode_response(s, s->line))
        return exchange_failed(s, NULL, "501 That is not base64");
    return GO_ON;
}

/* The client's first message, if the client speaks first: the initial response or, without one, the response to an
 * empty challenge. */
static enum next first_response(struct session *s, const char *initial)
{
    if (!initial)
        return sasl_turn(s, "");
    s->responded = now_ms();
    if (decode_response(s, strcmp(initial, "=") == 0 ? "" : initial))
        return GO_ON;
    reply_bad_command(s, NULL, "501 That is not base64");
    return STAY;
}

/* ---- The client's steps that all mechanisms share; they return EX_OK or the exit code ---- */

/* "*" cancels the exchange (RFC 4954, 4). */
static int cancel_auth(struct session *s, struct reply *r, int code)
{
    command(s, NULL, "*");
    return read_reply(s, "5.1.2", r) ? code : exit_code_lost(s);
}

static int cannot_compute(const struct session *s)
{
    log_event(s, LOG_ERR, "%s: AUTH given up: OpenSSL cannot compute the response", s->peer);
    return EX_SOFTWARE;
}

/* Reads a challenge and decodes it into s->response. */
static int read_challenge(struct session *s, struct reply *r)
{
    if (!read_reply(s, "5.1.2", r))
        return exit_code_lost(s);
    if (r->code != 334)
        return exit_code_refused(s, "AUTH", r, EX_NOPERM);
    s->response_len = base64_decode(s->response, sizeof s->response, r->text);
    if (s->response_len < 0 || strlen(s->response) != (size_t)s->response_len) {
        log_event(s, LOG_ERR, "%s: AUTH given up: the challenge is not base64", s->peer);
        return cancel_auth(s, r, EX_PROTOCOL);
    }
    return EX_OK;
}

/* Reads the last reply: 235 or a failure. */
static int read_outcome(struct session *s, struct reply *r)
{
    if (!read_reply(s, "5.1.2", r))
        return exit_code_lost(s);
    return r->code == 235 ? EX_OK : exit_code_refused(s, "AUTH", r, EX_NOPERM);
}

/* ---- CRAM-MD5 (5.1.2-c, RFC 2195), which every provider and every customer have in common ----
 *
 *     AUTH CRAM-MD5              ------------->
 *                                <-------------  334 "<random.time@host>", never the same twice
 *     name digest                ------------->     digest: HMAC-MD5 of the challenge, keyed with the secret
 *                                <-------------  235 */

static void hex_digits(char *out, const unsigned char *octets, size_t count)
{
    for (size_t i = 0; i < count; i++)
        snprintf(out + 2 * i, 3, "%02x", octets[i]);
}

/* The digest has 32 lower-case hexadecimal digits. False: OpenSSL failed. */
static bool cram_md5_digest(char digest[33], const char *secret, const char *challenge)
{
    unsigned char mac[16];
    unsigned int n = 0;
    if (!HMAC(EVP_md5(), secret, (int)strlen(secret), (const unsigned char *)challenge, strlen(challenge), mac, &n) ||
        n != sizeof mac)
        return false;
    hex_digits(digest, mac, sizeof mac);
    return true;
}

static bool cram_md5_challenge(char *out, size_t size, const char *host)
{
    unsigned char random[16];
    char text[33];
    if (RAND_bytes(random, sizeof random) != 1)
        return false;
    hex_digits(text, random, sizeof random);
    return (size_t)snprintf(out, size, "<%s.%lld@%s>", text, (long long)time(NULL), host) < size;
}

/* An account with only a verifier has no secret to compute a digest from, so AUTH fails. An unknown name and a wrong
 * secret take the same steps, and differ only in the last comparison. */
static enum next serve_cram_md5(struct session *s, enum mechanism m, const char *initial)
{
    char text[CHALLENGE_MAX], digest[33], *theirs;
    const struct account *account;
    struct verifier verifier;
    enum next got;
    bool known;
    if (initial) {
        reply_bad_command(s, NULL, "501 In CRAM-MD5 the server speaks first");
        return STAY;
    }
    if (!cram_md5_challenge(text, sizeof text, s->name))
        return auth_unavailable(s);
    got = sasl_turn(s, text);
    if (got != GO_ON)
        return got;

    theirs = strrchr(s->response, ' ');
    if (!theirs || strlen(s->response) != (size_t)s->response_len || strlen(theirs + 1) != 32)
        return auth_failed(s, "");
    *theirs++ = '\0';
    account = account_find(s->accounts, s->response);
    known = account && !account_verifier(account, &verifier);
    if (!cram_md5_digest(digest, known ? account->secret : NOBODYS_SECRET, text))
        return auth_unavailable(s);
    if (CRYPTO_memcmp(digest, theirs, 32) == 0 && known) {
        s->io.line_records = true; /* for fetchmail, which knows no other mechanism */
        return auth_succeeded(s, account, m);
    }
    return auth_failed(s, s->response);
}

static int prove_cram_md5(struct session *s, const struct customer *c, enum mechanism m, struct reply *r)
{
    char digest[33], response[MAILBOX_MAX + 40], encoded[BASE64_SIZE(sizeof response) + 1];
    int code;
    command(s, "5.1.2-c", "AUTH %s", mechanism_name(m));
    code = read_challenge(s, r);
    if (code != EX_OK)
        return code;
    if (!cram_md5_digest(digest, c->secret, s->response))
        return cancel_auth(s, r, cannot_compute(s));
    snprintf(response, sizeof response, "%s %s", c->user, digest);
    base64_encode(encoded, response, strlen(response));
    command(s, "5.1.2-a", "%s", encoded);
    return read_outcome(s, r);
}

/* ---- SCRAM-SHA-256 (RFC 5802, RFC 7677) ----
 *
 *     AUTH SCRAM-SHA-256 client-first-message   ------------->     header n=name,r=nonce
 *                                               <-------------  334 server-first-message: r=,s=salt,i=count
 *     client-final-message                      ------------->     c=header and channel,r=,p=proof
 *                                               <-------------  334 server-final-message: v=signature
 *     (an empty response)                       ------------->
 *                                               <-------------  235
 *
 * The server keeps StoredKey and ServerKey, which cannot be used to log in. The client proves that it has ClientKey
 * without sending it. The server's signature proves that it knows the account, too. Proof and signature are over
 * AuthMessage: client-first-bare, server-first and client-final without its proof, with commas between them. -PLUS adds
 * to c= what only the two ends of this TLS connection know. SMTP's success reply carries no data, so server-final is a
 * challenge, too (RFC 4954, 4). Names and secrets are UTF-8, without SASLprep, so both sides must write them alike. */

struct scram_exchange {
    bool plus;                        /* the mechanism's name ends in -PLUS */
    char header[MAILBOX_MAX + 64];    /* the GS2 header of client-first */
    char bare[CHALLENGE_MAX];         /* the rest of client-first */
    char name[MAILBOX_MAX];           /* the account's */
    char nonce[CHALLENGE_MAX];        /* both halves */
    char server_first[CHALLENGE_MAX];
    char final[2 * CHALLENGE_MAX];    /* client-final without its proof */
    char auth_message[5 * CHALLENGE_MAX];
    unsigned char binding[EVP_MAX_MD_SIZE];
    size_t binding_len;
};

bool hmac_sha256(const unsigned char *key, size_t key_len, const char *text, unsigned char out[32])
{
    return HMAC(EVP_sha256(), key, (int)key_len, (const unsigned char *)text, strlen(text), out, NULL) != NULL;
}

bool scram_keys(struct scram_keys *k, const char *secret, const unsigned char *salt, size_t salt_len, int iterations)
{
    unsigned char salted[32];
    bool done = PKCS5_PBKDF2_HMAC(secret, (int)strlen(secret), salt, (int)salt_len, iterations, EVP_sha256(),
                                  sizeof salted, salted) == 1 &&
                hmac_sha256(salted, sizeof salted, "Client Key", k->client) &&
                hmac_sha256(salted, sizeof salted, "Server Key", k->server) &&
                EVP_Digest(k->client, sizeof k->client, k->stored, NULL, EVP_sha256(), NULL) == 1;
    OPENSSL_cleanse(salted, sizeof salted);
    return done;
}

/* ClientProof = ClientKey XOR ClientSignature. The client makes the proof from its key, the server the key from the
 * proof. */
static bool scram_mask(const struct scram_keys *k, const char *auth_message, const unsigned char in[32],
                       unsigned char out[32])
{
    unsigned char signature[32];
    if (!hmac_sha256(k->stored, sizeof k->stored, auth_message, signature))
        return false;
    for (size_t i = 0; i < sizeof signature; i++)
        out[i] = in[i] ^ signature[i];
    return true;
}

/* Copies the value of an attribute such as r= from a message. False: it is absent or too long. */
static bool scram_attribute(const char *message, char name, char *out, size_t size)
{
    while (message[0] != name || message[1] != '=') {
        message = strchr(message, ',');
        if (!message)
            return false;
        message++;
    }
    message += 2;
    return (size_t)snprintf(out, size, "%.*s", (int)strcspn(message, ","), message) < size;
}

/* RFC 5802, 7: printable US-ASCII; the comma ends it. */
static bool nonce_valid(const char *nonce)
{
    return *nonce && printable(nonce, strlen(nonce)) && !strchr(nonce, ' ');
}

/* Appends this side's half of the nonce. */
static bool add_nonce(struct scram_exchange *e)
{
    unsigned char random[18];
    if (RAND_bytes(random, sizeof random) != 1)
        return false;
    base64_encode(e->nonce + strlen(e->nonce), random, sizeof random);
    return true;
}

/* Parses the salt and the iteration count of keys. The count must be large enough to slow down an eavesdropper that
 * guesses secrets, and small enough to be computed. */
static bool salt_and_count(struct verifier *v, const char *salt, const char *count)
{
    char decoded[SALT_MAX + 4];
    ssize_t len = base64_decode(decoded, sizeof decoded, salt);
    v->iterations = atoi(count);
    if (len < 1 || len > SALT_MAX || strspn(count, "0123456789") != strlen(count) ||
        v->iterations < SCRAM_ITERATIONS_LEAST || v->iterations > SCRAM_ITERATIONS_MOST)
        return false;
    v->salt_len = (size_t)len;
    memcpy(v->salt, decoded, v->salt_len);
    return true;
}

static bool decode_key(unsigned char key[32], const char *text)
{
    char decoded[64];
    if (base64_decode(decoded, sizeof decoded, text) != 32)
        return false;
    memcpy(key, decoded, 32);
    return true;
}

/* A verifier in the form of RFC 5803, without the scheme. */
bool verifier_parse(const char *text, struct verifier *v)
{
    char count[8], salt[BASE64_SIZE(SALT_MAX) + 1], stored[64], server[64];
    int end = 0;
    return sscanf(text, "%7[0-9],%88[^,],%63[^,],%63[^,]%n", count, salt, stored, server, &end) == 4 && !text[end] &&
           salt_and_count(v, salt, count) && decode_key(v->keys.stored, stored) && decode_key(v->keys.server, server);
}

/* Makes client-final without its proof, and AuthMessage. */
static bool scram_final(struct scram_exchange *e)
{
    char bound[sizeof e->header + EVP_MAX_MD_SIZE], encoded[BASE64_SIZE(sizeof bound) + 1];
    size_t n = strlen(e->header);
    memcpy(bound, e->header, n);
    memcpy(bound + n, e->binding, e->binding_len);
    base64_encode(encoded, bound, n + e->binding_len);
    return (size_t)snprintf(e->final, sizeof e->final, "c=%s,r=%s", encoded, e->nonce) < sizeof e->final &&
           (size_t)snprintf(e->auth_message, sizeof e->auth_message, "%s,%s,%s", e->bare, e->server_first, e->final) <
               sizeof e->auth_message;
}

/* Makes server-final, which only a server that knows the account can compute. */
static bool server_final(const struct scram_exchange *e, const struct verifier *v, char final[64])
{
    unsigned char signature[32];
    if (!hmac_sha256(v->keys.server, sizeof v->keys.server, e->auth_message, signature))
        return false;
    memcpy(final, "v=", 2);
    base64_encode(final + 2, signature, sizeof signature);
    return true;
}

/* ---- SCRAM, the server's half ---- */

/* The keys to check a name's proof with. An unknown name gets a secret that no account has, and a salt that is the same
 * as long as the accounts file is, so a client cannot recognise it. Every call costs one PBKDF2, with the iteration
 * count of most verifiers in the file. A client can still recognise a verifier with another count. At a provider with
 * another file, or after a change of the file, a verifier has the same salt as before, and other names do not. */
static bool keys_for(struct session *s, const char *name, struct verifier *v)
{
    const struct account *account = account_find(s->accounts, name);
    struct scram_keys wasted;
    bool stored = account_verifier(account, v);
    if (!stored) {
        v->iterations = s->accounts->iterations;
        v->salt_len = 16;
        if (!hmac_sha256(s->accounts->salt_key, sizeof s->accounts->salt_key, name, v->salt))
            return false;
    }
    return scram_keys(stored ? &wasted : &v->keys, account ? account->secret : NOBODYS_SECRET, v->salt, v->salt_len,
                      v->iterations);
}

/* RFC 5802, 6: the client's flag for channel binding. p: the client uses it. n: the client cannot use it. y: the client
 * can, but thinks that we cannot. Inside TLS we offered it, so y means a downgrade: an attacker removed it from our
 * offer. */
static bool scram_flag_right(struct session *s, struct scram_exchange *e, const char *flag)
{
    if (strncmp(flag, "p=", 2) == 0 && e->plus) {
        e->binding_len = channel_binding(s->io.tls, true, flag + 2, e->binding);
        return e->binding_len > 0;
    }
    return !e->plus && (strcmp(flag, "n") == 0 || (strcmp(flag, "y") == 0 && !s->io.tls));
}

/* "=2C" and "=3D" in a name stand for a comma and an equals sign; no other "=" is allowed. */
static bool scram_name(char *name)
{
    char *to = name;
    for (; *name; name++) {
        if (*name != '=') {
            *to++ = *name;
        } else if (strncmp(name, "=2C", 3) == 0 || strncmp(name, "=3D", 3) == 0) {
            *to++ = name[1] == '2' ? ',' : '=';
            name += 2;
        } else {
            return false;
        }
    }
    *to = '\0';
    return true;
}

/* client-first: flag "," [ "a=" authorization identity ] "," "n=" name "," "r=" nonce */
static bool take_client_first(struct session *s, struct scram_exchange *e)
{
    char *flag = s->response, *identity, *bare;
    if (strlen(flag) != (size_t)s->response_len || !(identity = strchr(flag, ',')) ||
        !(bare = strchr(identity + 1, ',')) || (size_t)(bare + 1 - flag) >= sizeof e->header)
        return false;
    memcpy(e->header, flag, (size_t)(bare + 1 - flag));
    e->header[bare + 1 - flag] = '\0';
    *identity++ = *bare++ = '\0';

    if ((size_t)snprintf(e->bare, sizeof e->bare, "%s", bare) >= sizeof e->bare || strncmp(bare, "n=", 2) != 0 ||
        !scram_attribute(bare, 'n', e->name, sizeof e->name) || !scram_name(e->name) ||
        e->name[0] == '\0' || !scram_attribute(bare, 'r', e->nonce, NONCE_MAX) || !nonce_valid(e->nonce))
        return false;
    if (*identity && (strncmp(identity, "a=", 2) != 0 || !scram_name(identity + 2) ||
                      strcmp(identity + 2, e->name) != 0))
        return false; /* acting for another account is not supported */
    return scram_flag_right(s, e, flag);
}

static bool make_server_first(struct scram_exchange *e, const struct verifier *v)
{
    char salt[BASE64_SIZE(SALT_MAX) + 1];
    base64_encode(salt, v->salt, v->salt_len);
    return add_nonce(e) && (size_t)snprintf(e->server_first, sizeof e->server_first, "r=%s,s=%s,i=%d", e->nonce, salt,
                                            v->iterations) < sizeof e->server_first;
}

/* client-final: c= and r= must have the expected values (extensions may follow), and the proof must be made with the
 * right secret. False: OpenSSL failed, which says nothing about the secret. */
static bool take_client_final(struct session *s, struct scram_exchange *e, const struct verifier *v, bool *right)
{
    char *proof = strstr(s->response, ",p=");
    unsigned char proven[32], client[32], stored[32];
    size_t n;
    *right = false;
    if (!proof || strlen(s->response) != (size_t)s->response_len || !scram_final(e) || !decode_key(proven, proof + 3))
        return true;
    *proof = '\0';
    n = strlen(e->final);
    if (strncmp(s->response, e->final, n) != 0 || (s->response[n] && s->response[n] != ',') ||
        (size_t)snprintf(e->auth_message, sizeof e->auth_message, "%s,%s,%s", e->bare, e->server_first,
                         s->response) >= sizeof e->auth_message)
        return true;

    if (!scram_mask(&v->keys, e->auth_message, proven, client) ||
        EVP_Digest(client, sizeof client, stored, NULL, EVP_sha256(), NULL) != 1)
        return false;
    *right = CRYPTO_memcmp(stored, v->keys.stored, sizeof stored) == 0;
    return true;
}

static enum next serve_scram(struct session *s, enum mechanism m, const char *initial)
{
    struct scram_exchange e = {.plus = m == SCRAM_PLUS};
    struct verifier v;
    char final[64];
    bool right;
    enum next got = first_response(s, initial);
    if (got != GO_ON)
        return got;
    if (!take_client_first(s, &e))
        return auth_failed(s, e.name);
    if (!keys_for(s, e.name, &v) || !make_server_first(&e, &v))
        return auth_unavailable(s);

    got = sasl_turn(s, e.server_first);
    if (got != GO_ON)
        return got;
    if (!take_client_final(s, &e, &v, &right))
        return auth_unavailable(s);
    if (!right || !account_find(s->accounts, e.name))
        return auth_failed(s, e.name);
    if (!server_final(&e, &v, final))
        return auth_unavailable(s);

    got = sasl_turn(s, final);
    if (got != GO_ON)
        return got;
    return s->response_len > 0 ? auth_failed(s, e.name) : auth_succeeded(s, account_find(s->accounts, e.name), m);
}

/* ---- SCRAM, the client's half ---- */

/* Writes a name as SCRAM does, where "=" and "," must be escaped. */
static void scram_escape(char *out, const char *name)
{
    for (; *name; name++)
        out += sprintf(out, *name == '=' ? "=3D" : *name == ',' ? "=2C" : "%c", *name);
    *out = '\0';
}

/* client-first. Its GS2 header has our flag for channel binding (RFC 5802, 6). p: we use it. y: we could, but received
 * no offer; if there was one, an attacker removed it. n: there is no TLS, or we do not use the offer. */
static bool make_client_first(struct session *s, const struct customer *c, struct scram_exchange *e, bool plus_offered)
{
    const char *type = s->io.tls && SSL_version(s->io.tls) >= TLS1_3_VERSION ? "tls-exporter" : "tls-server-end-point";
    char name[3 * MAILBOX_MAX + 1];
    if (!add_nonce(e))
        return false;
    if (e->plus)
        e->binding_len = channel_binding(s->io.tls, false, type, e->binding);
    if (e->plus && e->binding_len == 0)
        return false;
    snprintf(e->header, sizeof e->header, "%s%s,,", e->plus ? "p=" : s->io.tls && !plus_offered ? "y" : "n",
             e->plus ? type : "");
    scram_escape(name, c->user);
    return (size_t)snprintf(e->bare, sizeof e->bare, "n=%s,r=%s", name, e->nonce) < sizeof e->bare;
}

/* server-first must have our nonce, followed by the server's half, because otherwise it could be an old challenge. It
 * must also have a salt and one count. */
static bool take_server_first(struct scram_exchange *e, const char *challenge, struct verifier *v)
{
    char nonce[CHALLENGE_MAX], salt[BASE64_SIZE(SALT_MAX) + 1], count[8], again[CHALLENGE_MAX];
    const char *extensions = strstr(challenge, ",i=");
    size_t own = strlen(e->nonce);
    if (strncmp(challenge, "r=", 2) != 0 || !scram_attribute(challenge, 'r', nonce, sizeof nonce) ||
        strncmp(nonce, e->nonce, own) != 0 || !nonce_valid(nonce + own) ||
        !scram_attribute(challenge, 's', salt, sizeof salt) || !scram_attribute(challenge, 'i', count, sizeof count) ||
        !extensions || scram_attribute(extensions + 3, 'i', again, sizeof again) || !salt_and_count(v, salt, count))
        return false;
    snprintf(e->nonce, sizeof e->nonce, "%s", nonce);
    return (size_t)snprintf(e->server_first, sizeof e->server_first, "%s", challenge) < sizeof e->server_first;
}

/* client-final, with its proof. */
static bool make_client_final(const struct customer *c, struct scram_exchange *e, struct verifier *v, char *out,
                              size_t size)
{
    char encoded[BASE64_SIZE(32) + 1];
    unsigned char proof[32];
    if (!scram_final(e) || !scram_keys(&v->keys, c->secret, v->salt, v->salt_len, v->iterations) ||
        !scram_mask(&v->keys, e->auth_message, v->keys.client, proof))
        return false;
    base64_encode(encoded, proof, sizeof proof);
    return (size_t)snprintf(out, size, "%s,p=%s", e->final, encoded) < size;
}

static int prove_scram(struct session *s, const struct customer *c, enum mechanism m, struct reply *r)
{
    struct scram_exchange e = {.plus = m == SCRAM_PLUS};
    struct verifier v;
    char message[3 * CHALLENGE_MAX], encoded[BASE64_SIZE(sizeof message) + 1], final[64];
    int code;
    if (!make_client_first(s, c, &e, reply_offers(r, "AUTH", mechanism_name(SCRAM_PLUS))))
        return cannot_compute(s);
    base64_encode(encoded, message, (size_t)snprintf(message, sizeof message, "%s%s", e.header, e.bare));
    command(s, "5.1.2-d", "AUTH %s %s", mechanism_name(m), encoded);

    code = read_challenge(s, r);
    if (code != EX_OK)
        return code;
    if (!take_server_first(&e, s->response, &v)) {
        log_event(s, LOG_ERR, "%s: AUTH given up: the SCRAM challenge is not acceptable: %s", s->peer, s->response);
        return cancel_auth(s, r, EX_NOPERM);
    }
    if (!make_client_final(c, &e, &v, message, sizeof message))
        return cancel_auth(s, r, cannot_compute(s));
    base64_encode(encoded, message, strlen(message));
    command(s, "5.1.2-a", "%s", encoded);

    code = read_challenge(s, r);
    if (code != EX_OK && r->code != 235)
        return code;
    if (!server_final(&e, &v, final))
        return r->code == 334 ? cancel_auth(s, r, cannot_compute(s)) : cannot_compute(s);
    if (r->code == 235 || strcspn(s->response, ",") != strlen(final) || /* extensions may follow a comma */
        CRYPTO_memcmp(s->response, final, strlen(final)) != 0) {
        log_event(s, LOG_ERR,
                  "%s did not prove that it knows the secret: it may be an impostor; no ATRN sent", s->peer);
        stream_break(&s->io, "the provider did not authenticate itself");
        return EX_NOPERM;
    }
    command(s, "5.1.2-a", "%s", "");
    return read_outcome(s, r);
}

/* ---- EXTERNAL (RFC 4422, appendix A) ----
 *
 *     AUTH EXTERNAL = or a name  ------------->     the certificate of the TLS handshake names the client
 *                                <-------------  235 */

/* The certificate must name the account. If the client gives a name, it must be the same. */
static enum next serve_external(struct session *s, enum mechanism m, const char *initial)
{
    const struct account *account = NULL;
    X509 *certificate;
    char *name = NULL;
    enum next got = first_response(s, initial);
    if (got != GO_ON)
        return got;
    certificate = SSL_get1_peer_certificate(s->io.tls);
    for (int i = 0; !account && certificate && (name = certificate_name(certificate, i)); i++) {
        account = account_find(s->accounts, name);
        if (account && s->response_len > 0 &&
            (strcmp(s->response, name) != 0 || strlen(name) != (size_t)s->response_len))
            account = NULL; /* an authorization identity that is not this account */
        OPENSSL_free(name);
    }
    X509_free(certificate);
    if (account)
        return auth_succeeded(s, account, m);
    return auth_failed(s, s->response_len > 0 ? s->response : "the certificate's name");
}

static int prove_external(struct session *s, const struct customer *c, enum mechanism m, struct reply *r)
{
    char encoded[BASE64_SIZE(MAILBOX_MAX) + 1] = "=";
    if (c->user)
        base64_encode(encoded, c->user, strlen(c->user));
    command(s, "5.1.2-f", "AUTH %s %s", mechanism_name(m), encoded);
    return read_outcome(s, r);
}

/* ---- PLAIN (RFC 4616) sends the secret itself, so it needs TLS, and the trace does not show it ----
 *
 *     AUTH PLAIN response        ------------->     [authorization identity] NUL name NUL secret
 *                                <-------------  235 */

static enum next serve_plain(struct session *s, enum mechanism m, const char *initial)
{
    const char *identity = s->response, *name, *secret, *end;
    const struct account *account;
    struct verifier v;
    struct scram_keys keys;
    enum next got;
    s->hide_response = true;
    got = first_response(s, initial);
    s->hide_response = false;
    if (got != GO_ON)
        return got;

    end = s->response + s->response_len;
    name = identity + strlen(identity) + 1;
    secret = name < end ? name + strlen(name) + 1 : end + 1;
    if (secret > end || secret + strlen(secret) != end)
        return auth_failed(s, "");
    account = account_find(s->accounts, name);
    if (!keys_for(s, name, &v) || !scram_keys(&keys, secret, v.salt, v.salt_len, v.iterations))
        return auth_unavailable(s);
    if (CRYPTO_memcmp(keys.stored, v.keys.stored, sizeof keys.stored) == 0 && account &&
        (*identity == '\0' || strcmp(identity, name) == 0))
        return auth_succeeded(s, account, m);
    return auth_failed(s, name);
}

static int prove_plain(struct session *s, const struct customer *c, enum mechanism m, struct reply *r)
{
    char response[MAILBOX_MAX + SECRET_MAX + 4], encoded[BASE64_SIZE(sizeof response) + 1];
    int len = snprintf(response, sizeof response, "%c%s%c%s", '\0', c->user, '\0', c->secret);
    base64_encode(encoded, response, (size_t)len);
    trace_line(s, CUSTOMER, "5.1.2-d", "AUTH %s (response not shown)", mechanism_name(m));
    stream_write(&s->io, "AUTH PLAIN ", 11);
    stream_write(&s->io, encoded, strlen(encoded));
    stream_write(&s->io, "\r\n", 2);
    OPENSSL_cleanse(response, sizeof response);
    OPENSSL_cleanse(encoded, sizeof encoded);
    return read_outcome(s, r);
}

/* ==== 7. Failure notices =============================================================================
 *
 * 4-e: a server that has accepted mail is responsible for it until it is delivered or its sender has been told. If the
 * customer refuses recipients with 5xx, the message is returned: one notice (RFC 3461 to 3464) lists all recipients
 * that were refused in this session. The notice goes to the site's own MTA (--sendmail), and only after that has
 * accepted it are the recipients struck out. Mail from the null sender is a notice itself, so no notice is sent for it.
 * It is set aside in the folder .Undeliverable of its domain, for the administrator.
 */

#define TEXT_LINE 998            /* RFC 5322, 2.1.1: octets of a line without CRLF */
#define NOTICE_HEADER_MAX 65536  /* octets of a returned header */

/* A file without a name. Programs that we run do not inherit it; with tmpfile(3) they could, for a moment. */
static FILE *scratch_file(void)
{
    char path[] = P_tmpdir "/odmr-XXXXXX";
    int fd = mkostemp(path, O_CLOEXEC);
    FILE *file = fd < 0 ? NULL : fdopen(fd, "w+");
    if (fd >= 0)
        unlink(path);
    if (fd >= 0 && !file)
        close(fd);
    return file;
}

/* RFC 3463: the enhanced code that the reply starts with or, without one, the class from the first digit. */
static void write_status(FILE *out, const struct reason *reason)
{
    const char *text = reason->ours ? reason->text : reason->text + 4;
    char class[2], subject[4], detail[4], after = ' ';
    if (sscanf(text, "%1[45].%3[0-9].%3[0-9]%c", class, subject, detail, &after) >= 3 && after == ' ')
        fprintf(out, "Status: %s.%s.%s\n", class, subject, detail);
    else
        fprintf(out, "Status: %c.0.0\n", reason->text[0]);
}

/* RFC 3464, 2.3; with an address in UTF-8, RFC 6533. */
static void write_recipient_fields(FILE *out, const struct session *s, const struct recipient *to)
{
    fprintf(out, "\nFinal-Recipient: %s; %s\nAction: failed\n", ascii(to->address) ? "rfc822" : "utf-8", to->address);
    write_status(out, to->reason);
    if (to->reason->ours) {
        fprintf(out, "Diagnostic-Code: x-odmr; %s\n", to->reason->text);
        return;
    }
    if (s)
        fprintf(out, "Remote-MTA: dns; %s\n", s->peer_name);
    fprintf(out, "Diagnostic-Code: smtp; %s\n", to->reason->text);
    write_date(out, "Last-Attempt-Date: ", time(NULL));
}

static void write_plain_words(FILE *out, const struct session *s, const struct recipient *to)
{
    const char *text = to->reason->text;
    (void)s;
    if (to->reason->ours)
        text += strcspn(text, " ") + 1; /* without its status code */
    fprintf(out, "  <%s>\n      %s\n\n", to->address, text);
}

/* Calls the writer for each refused recipient. The parts for people and for programs list the same recipients. */
static void for_each_refused(FILE *out, const struct session *s, const struct message *m,
                             void (*write_one)(FILE *, const struct session *, const struct recipient *))
{
    for (size_t i = 0; i < m->recipients; i++)
        if (m->list[i].fate == REFUSED)
            write_one(out, s, &m->list[i]);
}

/* Writes the header of the returned message, not its body (RFC 3461, 6.3, allows both). The output is text, whatever
 * the input is: lines of at most 998 octets (RFC 5322, 2.1.1), no control characters, no octets over 127 but UTF-8.
 * False: the file cannot be read now. */
static bool write_original_header(FILE *out, const struct message *m)
{
    struct line_reader r = {.of = m, .next_read = m->start};
    while (r.end - m->start < NOTICE_HEADER_MAX && next_line(&r) && r.line[0]) {
        size_t len = strlen(r.line);
        for (char *p = r.line; *p; p++) {
            unsigned char c = (unsigned char)*p;
            if ((c < 0x20 && c != '\t') || c == 0x7f || (c > 0x7f && !m->utf8_header))
                *p = '?';
        }
        fprintf(out, "%.*s\n", (int)utf8_prefix(r.line, len < TEXT_LINE ? len : TEXT_LINE), r.line);
    }
    return !r.failed;
}

static void write_notice_top(FILE *out, const char *host, const struct message *m, const char *boundary, bool utf8)
{
    fprintf(out, "From: Mail Delivery System <MAILER-DAEMON@%s>\nTo: <%s>\n", host, m->sender);
    fprintf(out, "Subject: Undelivered mail returned to its sender\n");
    write_date(out, "Date: ", time(NULL));
    fprintf(out, "Message-ID: <%s@%s>\nAuto-Submitted: auto-replied\nMIME-Version: 1.0\n", boundary, host);
    fprintf(out, "Content-Type: multipart/report; report-type=%sdelivery-status;\n\tboundary=\"%s\"\n%s\n",
            utf8 ? "global-" : "", boundary, utf8 ? "Content-Transfer-Encoding: 8bit\n" : "");
}

/* multipart/report (RFC 6522): a part for people, a part for programs, and the header of the message. */
static bool write_notice(FILE *out, const char *host, const struct session *s, const struct message *m)
{
    bool utf8 = m->utf8_header || m->utf8_address; /* then RFC 6533's types */
    const char *eight_bit = utf8 ? "Content-Transfer-Encoding: 8bit\n" : "";
    char boundary[48];
    unsigned char random[12];
    bool done;
    if (RAND_bytes(random, sizeof random) != 1)
        return false;
    hex_digits(boundary, random, sizeof random);
    write_notice_top(out, host, m, boundary, utf8);
    fprintf(out, "--%s\nContent-Type: text/plain; charset=%s\n%s\n", boundary, utf8 ? "utf-8" : "us-ascii", eight_bit);
    fprintf(out, "This is the mail relay at %s.\n\nYour message could not be delivered to the recipients below, and "
                 "will not\nbe tried again. The reason stands below each of them. The header of your\nmessage is "
                 "attached.\n\n", host);
    for_each_refused(out, s, m, write_plain_words);
    fprintf(out, "--%s\nContent-Type: message/%sdelivery-status\n%s\nReporting-MTA: dns; %s\n", boundary,
            utf8 ? "global-" : "", eight_bit, host);
    write_date(out, "Arrival-Date: ", m->arrived.tv_sec);
    for_each_refused(out, s, m, write_recipient_fields);
    fprintf(out, "\n--%s\nContent-Type: %s\n%s\n", boundary, utf8 ? "message/global-headers" : "text/rfc822-headers",
            eight_bit);
    done = write_original_header(out, m);
    fprintf(out, "\n--%s--\n", boundary);
    return done && fflush(out) == 0 && !ferror(out);
}

/* Runs sendmail, without a shell. True: sendmail has accepted the notice. If sendmail hangs, a session waits for it
 * only once, so that a shutdown does not wait for each refused message. The others stay queued. */
static bool hand_over_notice(const struct provider *p, FILE *notice, const struct message *m, struct session *s)
{
    char *const argv[] = {(char *)p->sendmail, "-i", "-f", "<>", "--", (char *)m->sender, NULL};
    pid_t pid;
    int problem, status;
    rewind(notice);
    problem = start_program(argv, fileno(notice), -1, &pid);
    if (problem) {
        log_event(s, LOG_ERR, "failure notice for %s not sent: --sendmail %s: %s; message kept", m->path, p->sendmail,
                  strerror(problem));
        return false;
    }
    status = finish_program(pid, NOTICE_TIMEOUT);
    if (status > 0)
        log_event(s, LOG_ERR, "failure notice for %s not accepted: %s exited %d; message kept", m->path, p->sendmail,
                  status);
    if (status < 0) {
        log_event(s, LOG_ERR, "failure notice for %s not accepted: %s did not end by itself; message kept", m->path,
                  p->sendmail);
        if (s)
            s->no_notices = true;
    }
    return status == 0;
}

/* Sends a notice to the sender or, if there is none, sets the message aside. False: the message stays queued. */
static bool return_refused(const struct provider *p, struct session *s, const struct message *m)
{
    FILE *notice;
    bool done;
    if (m->sender[0] == '\0') {
        done = message_set_aside(m);
        log_event(s, done ? LOG_NOTICE : LOG_ERR,
                  done ? "%s has no sender to return it to: moved to " UNDELIVERABLE
                       : "%s has no sender to return it to and cannot be moved to " UNDELIVERABLE "; message kept",
                  m->path);
        return done;
    }
    if (s && (s->no_notices || atomic_load(&p->stopping))) {
        log_event(s, LOG_NOTICE, "failure notice for %s not sent in this session; message kept", m->path);
        return false;
    }
    notice = scratch_file();
    done = notice && write_notice(notice, p->name, s, m);
    if (!done)
        log_event(s, LOG_ERR, "failure notice for %s cannot be written (%s); message kept", m->path,
                  strerror(errno));
    done = done && hand_over_notice(p, notice, m, s);
    if (notice)
        fclose(notice);
    if (done)
        log_event(s, LOG_NOTICE, "returned %s to <%s>", m->path, m->sender);
    return done;
}

/* If the provider is killed before the file is changed, the message is sent again. It is never lost. */
bool update_queue(const struct provider *p, struct session *s, struct message *m)
{
    size_t count[VERDICTS] = {0};
    enum update got;
    bool sound = true;
    for (size_t i = 0; i < m->recipients; i++)
        count[m->list[i].fate]++;
    if (count[REFUSED] > 0 && return_refused(p, s, m)) {
        for (size_t i = 0; i < m->recipients; i++)
            if (m->list[i].fate == REFUSED)
                m->list[i].fate = RETURNED;
        count[RETURNED] += count[REFUSED];
    }
    if (count[DELIVERED] + count[RETURNED] == 0)
        return true;
    if (count[DELIVERED] + count[RETURNED] + count[REPEATED] < m->recipients) {
        got = message_strike_out(m);
    } else if ((got = message_remove(m)) == FAILED) {
        log_event(s, LOG_ERR, "cannot remove %s (%s): its recipients are struck out instead, and this session takes no "
                              "more from its directory", m->path, strerror(m->problem));
        got = message_strike_out(m);
        sound = false;
    }
    if (got == REPLACED)
        log_event(s, LOG_WARNING, "%s was replaced or changed while it was sent: message kept, it is sent again",
                  m->path);
    else if (got == FAILED)
        log_event(s, LOG_ERR, "cannot strike out recipients of %s (%s): it is sent to them again", m->path,
                  strerror(m->problem));
    return sound && got != FAILED;
}

/* ==== 8. The queue: the envelope =====================================================================
 *
 * A queued message is an RFC 5322 message below a block of header fields that the last delivery agent wrote:
 * Return-Path, Delivered-To, X-Original-To, Envelope-To and Delivery-Date, in any order, and no others. That block is
 * the envelope. It is read once, when the message is claimed, into an array of recipients. Each entry stores where the
 * @ of its address is in the file. When a recipient is delivered or returned, this @ is overwritten with "=", which
 * strikes the recipient out. An address without @ is not a recipient. */

static const struct {
    const char *name;
    enum field field;
} envelope_fields[] = {
    {"Return-Path:", RETURN_PATH},     {"Delivered-To:", DELIVERED_TO},   {"Envelope-To:", ENVELOPE_TO},
    {"X-Original-To:", X_ORIGINAL_TO}, {"Delivery-Date:", DELIVERY_DATE},
};

enum field envelope_field(const char *line, size_t *value)
{
    for (size_t i = 0; i < sizeof envelope_fields / sizeof *envelope_fields; i++) {
        *value = strlen(envelope_fields[i].name);
        if (strncasecmp(line, envelope_fields[i].name, *value) == 0)
            return envelope_fields[i].field;
    }
    return NO_FIELD;
}

static enum claim message_hold(struct message *m, const char *why)
{
    m->held = why;
    return HELD;
}

/* Lack of memory or a disk error is no fault of the message, so the message is never held because of it. */
static enum claim message_trouble(struct message *m, const char *why)
{
    m->trouble = why;
    m->problem = errno;
    return BUSY;
}

/* Reads octets of its file, from memory if they are still there. Returns as pread(2). */
static ssize_t message_octets(const struct message *m, char *data, size_t size, off_t at)
{
    size_t left = (uint64_t)at < m->top_len ? m->top_len - (size_t)at : 0;
    if (left == 0)
        return pread(m->fd, data, size, at);
    size = size < left ? size : left;
    memcpy(data, m->top + at, size);
    return (ssize_t)size;
}

bool next_line(struct line_reader *r)
{
    size_t n = 0, kept;
    unsigned char all = 0;
    for (char c = '\0'; c != '\n'; n++) {
        if (r->at == r->filled) {
            ssize_t got = message_octets(r->of, r->data, sizeof r->data, r->next_read);
            r->failed = got < 0;
            if (got <= 0)
                break;
            r->next_read += got;
            r->at = 0;
            r->filled = (size_t)got;
        }
        c = r->data[r->at++];
        all |= (unsigned char)c;
        if (n < sizeof r->line - 1)
            r->line[n] = c;
    }
    if (n == 0 || r->failed)
        return false;
    r->end = r->next_read - (off_t)(r->filled - r->at);
    r->start = r->end - (off_t)n;
    r->cut = n > sizeof r->line - 1;
    r->eight_bit = all > 127;
    kept = r->cut ? sizeof r->line - 1 : n;
    r->nul = memchr(r->line, '\0', kept) != NULL;
    r->line[kept] = '\0';
    r->line[strcspn(r->line, "\r\n")] = '\0';
    return true;
}

/* Copies the next address from a field's value. The address ends at a comma outside quotes; blanks and angle brackets
 * around it are left out. Returns where it starts in the value, or NULL when none is left. */
static const char *cut_address(const char **rest, char *address, size_t size)
{
    const char *start = *rest + strspn(*rest, " \t,"), *p = start, *end;
    bool quoted = false;
    size_t n;
    if (*start == '\0')
        return NULL;
    for (; *p && (quoted || *p != ','); p++) {
        if (*p == '\\' && quoted && p[1])
            p++;
        else if (*p == '"')
            quoted = !quoted;
    }
    *rest = end = p;
    while (end > start && (end[-1] == ' ' || end[-1] == '\t'))
        end--;
    if (*start == '<' && end[-1] == '>' && end - start >= 2) {
        start++;
        end--;
    }
    n = (size_t)(end - start) < size - 1 ? (size_t)(end - start) : size - 1;
    memcpy(address, start, n);
    address[n] = '\0';
    return start;
}

static void forget_recipients(struct message *m)
{
    for (size_t i = 0; i < m->recipients; i++)
        free(m->list[i].address);
    m->recipients = 0;
}

/* Delivered-To takes precedence over Envelope-To, and Envelope-To over X-Original-To. When a field of higher precedence
 * appears, the recipients of the other field are dropped, even if all the new ones are struck out. */
static enum claim add_recipient(struct message *m, enum field field, const char *address, off_t start)
{
    const char *domain = mailbox_domain(address);
    if (m->field == NO_FIELD || field < m->field) {
        forget_recipients(m);
        m->field = field;
    }
    if (field > m->field || !domain)
        return CLAIMED;
    if (m->recipients == ENVELOPE_RECIPIENTS_MAX)
        return message_hold(m, "more than 100,000 recipients in its envelope");
    if ((m->recipients & (m->recipients - 1)) == 0) { /* 0, or a power of two: the list is full */
        struct recipient *list = realloc(m->list, (m->recipients ? 2 * m->recipients : 1) * sizeof *list);
        if (!list)
            return message_trouble(m, "out of memory for its recipients");
        m->list = list;
    }
    m->list[m->recipients] = (struct recipient){.address = strdup(address), .at = start + (domain - 1 - address)};
    if (!m->list[m->recipients].address)
        return message_trouble(m, "out of memory for its recipients");
    m->recipients++;
    return CLAIMED;
}

/* Takes the addresses from a line of the envelope. */
static enum claim take_addresses(struct message *m, const struct line_reader *r, enum field field, const char *value)
{
    char address[sizeof r->line];
    const char *start;
    enum claim result = CLAIMED;
    while (result == CLAIMED && field != DELIVERY_DATE && (start = cut_address(&value, address, sizeof address))) {
        if (field != RETURN_PATH)
            result = add_recipient(m, field, address, r->start + (start - r->line));
        else if (sender_valid(address))
            memcpy(m->sender, address, strlen(address) + 1);
        else
            result = message_hold(m, "its Return-Path is not a mailbox");
    }
    return result;
}

/* Reads the next line of the block, and returns its value. *field is the field that it belongs to; NO_FIELD before the
 * first line. A second Return-Path is outside the block, because an earlier hop wrote it. Returns NULL if the message
 * starts here, or the file ends or cannot be read. */
static const char *next_envelope_line(struct line_reader *r, enum field *field, bool *has_sender)
{
    size_t value;
    if (!next_line(r))
        return NULL;
    if (*field != NO_FIELD && (r->line[0] == ' ' || r->line[0] == '\t'))
        return r->line; /* it continues the field above */
    *field = envelope_field(r->line, &value);
    if (*field == NO_FIELD || (*field == RETURN_PATH && *has_sender))
        return NULL;
    *has_sender |= *field == RETURN_PATH;
    return r->line + value;
}

static enum claim take_lines(struct message *m)
{
    struct line_reader r = {.of = m};
    enum field field = NO_FIELD;
    enum claim result = CLAIMED;
    bool has_sender = false;
    const char *value;
    while (result == CLAIMED && (value = next_envelope_line(&r, &field, &has_sender))) {
        if (r.cut || r.nul)
            return message_hold(m, r.cut ? "a line of its envelope is too long" : "a NUL octet in its envelope");
        m->start = r.end;
        result = take_addresses(m, &r, field, value);
    }
    return r.failed ? message_trouble(m, "the file cannot be read") : result;
}

/* Orders mailboxes; returns 0 if they are equal. Case matters in local parts, but not in domains. */
static int compare_mailboxes(const struct recipient *a, const struct recipient *b)
{
    int order = strcasecmp(a->address, b->address);
    return order ? order : strncmp(a->address, b->address, (size_t)(mailbox_domain(a->address) - a->address));
}

static int by_mailbox(const void *left, const void *right)
{
    const struct recipient *a = *(struct recipient *const *)left, *b = *(struct recipient *const *)right;
    int order = compare_mailboxes(a, b);
    return order ? order : a < b ? -1 : 1;
}

/* If a mailbox appears twice, it is one recipient. False: out of memory. */
static bool find_repeated(struct message *m)
{
    struct recipient **sorted = malloc(m->recipients * sizeof *sorted), *first;
    if (!sorted)
        return false;
    for (size_t i = 0; i < m->recipients; i++)
        sorted[i] = &m->list[i];
    qsort(sorted, m->recipients, sizeof *sorted, by_mailbox);
    first = sorted[0];
    for (size_t i = 1; i < m->recipients; i++) {
        if (compare_mailboxes(first, sorted[i]) != 0) {
            first = sorted[i];
        } else {
            sorted[i]->fate = REPEATED;
            sorted[i]->first = first;
        }
    }
    free(sorted);
    return true;
}

/* Marks the recipients that get nothing here: those of other domains, and those that are not mailboxes. */
static enum claim sort_out_recipients(struct message *m)
{
    size_t domain_len = strcspn(m->path, "/"), ours = 0;
    bool valid = true;
    if (m->recipients == 0)
        return message_hold(m, m->field == NO_FIELD ? "no recipient in its envelope"
                                                    : "no recipient is left in its envelope: all are struck out");
    m->utf8_address = !ascii(m->sender);
    for (size_t i = 0; i < m->recipients; i++) {
        struct recipient *r = &m->list[i];
        const char *domain = mailbox_domain(r->address);
        bool mailbox = recipient_valid(r->address);
        if (!mailbox || strlen(domain) != domain_len || strncasecmp(domain, m->path, domain_len) != 0)
            r->fate = FOREIGN;
        valid = valid && mailbox;
        m->utf8_address |= r->fate == OWED && !ascii(r->address);
        ours += r->fate == OWED;
    }
    if (m->recipients > 1 && !find_repeated(m))
        return message_trouble(m, "out of memory for its recipients");
    if (ours > 0)
        return CLAIMED;
    return message_hold(m, valid ? "its recipients belong to another domain"
                                 : "a recipient in its envelope is not a mailbox");
}

static enum claim envelope_read(struct message *m)
{
    enum claim result = take_lines(m);
    return result == CLAIMED ? sort_out_recipients(m) : result;
}

const struct reason *message_reason(struct message *m, int code, const char *text)
{
    char reason[REFUSAL_SIZE];
    struct reason *r = m->reasons;
    if (code)
        snprintf(reason, sizeof reason, "%03d %s", code, text);
    else
        snprintf(reason, sizeof reason, "%s", text);
    if (r && r->ours == !code && strcmp(r->text, reason) == 0)
        return r;
    r = malloc(sizeof *r + strlen(reason) + 1);
    if (!r)
        return NULL;
    r->ours = !code;
    memcpy(r->text, reason, strlen(reason) + 1);
    r->next = m->reasons;
    m->reasons = r;
    return r;
}

/* ==== 8. The queue: Maildirs, messages, claims =======================================================
 *
 * The queue is DIR/<domain>/{new,cur,tmp}. A delivery agent writes into tmp and renames into new. A message in new is
 * therefore complete, and reading needs no lock. Only the holder of a message's claim changes the file, to strike out
 * recipients. Two sessions must not send the same message, so a session claims the message with flock(2) on its file.
 * A claim needs no clean-up, because it ends with its holder: a session, a process or a machine. */

#define MESSAGE_TOP 65536        /* octets of a message that are kept in memory until it is sent */
#define FIRST_SECOND 100000000   /* 1973: a file name that starts with a smaller number is not a Maildir name */
#define LAST_SECOND 9999999999   /* 2286 */
#define TMP_AGE (36 * 3600)      /* seconds: Maildir's rule for files in tmp */

/* A Maildir name starts with the second of delivery. Most writers add the microseconds after an M; Exim writes an H. If
 * a name does not start with a plausible second, the file's time of modification is used. */
static void arrival_of(struct queued *q, int dir, const char *name)
{
    char *end;
    const char *micro;
    struct stat st;
    unsigned long long second = strtoull(name, &end, 10);
    q->second = q->micro = 0;
    if (isdigit((unsigned char)name[0]) && *end == '.' && second >= FIRST_SECOND && second <= LAST_SECOND) {
        q->second = (int64_t)second;
        micro = end + strcspn(end, "MH");
        while (*micro && !isdigit((unsigned char)micro[1]))
            micro += 1 + strcspn(micro + 1, "MH");
        if (*micro)
            q->micro = (int64_t)strtoull(micro + 1, NULL, 10);
    } else if (fstatat(dir, name, &st, AT_SYMLINK_NOFOLLOW) == 0) {
        q->second = st.st_mtim.tv_sec;
        q->micro = st.st_mtim.tv_nsec / 1000;
    }
}

static int by_arrival(const void *left, const void *right)
{
    const struct queued *a = left, *b = right;
    if (a->second != b->second)
        return a->second < b->second ? -1 : 1;
    if (a->micro != b->micro)
        return a->micro < b->micro ? -1 : 1;
    return strverscmp(strrchr(a->path, '/'), strrchr(b->path, '/'));
}

static bool backlog_add(struct backlog *b, int dir, const char *domain, const char *box, const char *name)
{
    struct queued *q;
    size_t size = strlen(domain) + strlen(box) + strlen(name) + 3;
    if (b->count == b->room) {
        size_t room = b->room ? b->room * 2 : 64;
        q = realloc(b->list, room * sizeof *q);
        if (!q)
            return false;
        b->list = q;
        b->room = room;
    }
    q = &b->list[b->count];
    q->path = malloc(size);
    if (!q->path)
        return false;
    snprintf(q->path, size, "%s/%s/%s", domain, box, name);
    arrival_of(q, dir, name);
    b->count++;
    return true;
}

/* Returns NULL if the directory cannot be opened or the path is a link; errno says why. */
static DIR *open_directory(int queue, const char *path)
{
    int fd = openat(queue, path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    DIR *dir = fd < 0 ? NULL : fdopendir(fd);
    if (fd >= 0 && !dir)
        close(fd);
    return dir;
}

/* Lists one of a Maildir's two boxes, new or cur. A missing directory holds no mail. False: the directory cannot be
 * read, so the customer must try later and must not be told that there is no mail. */
static bool list_box(struct backlog *b, int queue, const char *domain, const char *box)
{
    char path[MAILDIR_PATH + sizeof "/cur"];
    struct dirent *entry;
    bool complete = true;
    DIR *dir;
    int problem;
    snprintf(path, sizeof path, "%s/%s", domain, box);
    dir = open_directory(queue, path);
    if (!dir)
        return errno == ENOENT;
    while (complete) {
        errno = 0;
        entry = readdir(dir);
        if (!entry) {
            complete = errno == 0;
            break;
        }
        if (entry->d_name[0] != '.' && !backlog_add(b, dirfd(dir), domain, box, entry->d_name))
            complete = false;
    }
    problem = errno;
    closedir(dir);
    errno = problem;
    return complete;
}

bool short_of_descriptors(int problem)
{
    return problem == EMFILE || problem == ENFILE;
}

bool file_system_gone(int problem)
{
    return problem == ENOTCONN || problem == ESHUTDOWN || problem == EIO;
}

bool backlog_read(struct backlog *b, const struct session *s, int queue, const char *domains)
{
    static const char *const boxes[] = {"new", "cur"};
    const char *d;
    size_t len;
    bool complete = true;
    *b = (struct backlog){.queue = queue};
    while ((d = next_domain(&domains, &len))) {
        char domain[MAILDIR_PATH];
        snprintf(domain, sizeof domain, "%.*s", (int)len, d);
        for (size_t i = 0; i < 2; i++) {
            int problem = list_box(b, queue, domain, boxes[i]) ? 0 : errno;
            if (!problem)
                continue;
            log_event(s, LOG_ERR, "cannot read the queue of %s: %s; its mail waits", domain, strerror(problem));
            complete = false;
            if (file_system_gone(problem))
                domains = NULL;
            break; /* the other box would most likely fail in the same way */
        }
    }
    if (b->count > 1)
        qsort(b->list, b->count, sizeof *b->list, by_arrival);
    return complete;
}

/* The box is a path's part before the last slash. */
static size_t box_len(const char *path)
{
    return (size_t)(strrchr(path, '/') - path);
}

void backlog_skip_box(struct backlog *b, const char *path)
{
    size_t kept = b->next, len = box_len(path) + 1;
    for (size_t i = b->next; i < b->count; i++) {
        if (strncmp(b->list[i].path, path, len) == 0)
            free(b->list[i].path);
        else
            b->list[kept++] = b->list[i];
    }
    b->count = kept;
}

void backlog_free(struct backlog *b)
{
    for (size_t i = 0; i < b->count; i++)
        free(b->list[i].path);
    free(b->list);
    *b = (struct backlog){.queue = -1};
}

/* ---- All domains, and unfinished files ---- */

bool for_each_name(int queue, bool all, bool (*visit)(void *context, int queue, const char *name), void *context)
{
    DIR *dir = open_directory(queue, ".");
    struct dirent *entry;
    bool go_on = true;
    if (!dir)
        return false;
    while (go_on && (entry = readdir(dir)))
        if (domain_valid(entry->d_name, strlen(entry->d_name)) || (all && entry->d_name[0] != '.'))
            go_on = visit(context, queue, entry->d_name);
    closedir(dir);
    return go_on;
}

bool for_each_domain(int queue, bool (*visit)(void *context, int queue, const char *domain), void *context)
{
    return for_each_name(queue, false, visit, context);
}

/* Is this a Maildir, and not just a directory with a tmp in it? */
static bool is_maildir(int queue, const char *maildir)
{
    struct stat st;
    char path[MAILDIR_PATH];
    for (int i = 0; i < 2; i++) {
        snprintf(path, sizeof path, "%s/%s", maildir, i ? "new" : "cur");
        if (fstatat(queue, path, &st, AT_SYMLINK_NOFOLLOW) < 0 || !S_ISDIR(st.st_mode))
            return false;
    }
    return true;
}

/* Removes the files in tmp that were not touched for 36 hours: by Maildir's rule, their delivery has failed. */
static void clean_tmp(int queue, const char *maildir)
{
    char path[MAILDIR_PATH];
    struct dirent *entry;
    struct stat st;
    DIR *dir;
    snprintf(path, sizeof path, "%s/tmp", maildir);
    dir = is_maildir(queue, maildir) ? open_directory(queue, path) : NULL;
    while (dir && (entry = readdir(dir)))
        if (entry->d_name[0] != '.' && fstatat(dirfd(dir), entry->d_name, &st, AT_SYMLINK_NOFOLLOW) == 0 &&
            S_ISREG(st.st_mode) && time(NULL) - st.st_mtime > TMP_AGE && time(NULL) - st.st_atime > TMP_AGE &&
            unlinkat(dirfd(dir), entry->d_name, 0) == 0)
            log_event(NULL, LOG_NOTICE, "removed %s/%s: unfinished for 36 hours", path, entry->d_name);
    if (dir)
        closedir(dir);
}

bool clean_domain(void *context, int queue, const char *domain)
{
    char folder[MAILDIR_PATH];
    (void)context;
    snprintf(folder, sizeof folder, "%s/%s", domain, UNDELIVERABLE);
    clean_tmp(queue, domain);
    clean_tmp(queue, folder);
    return true;
}

/* ---- One message: claim, scan, send, remove ----
 *
 * The content is read twice, to scan it and to send it. The top of a claimed message is therefore read from the file
 * once and kept in memory until it is sent. Most messages are so short that the top is the whole message. */

/* If there is no memory for the top, or if it cannot be read, the top is empty and all octets come from the file. */
static void message_keep_top(struct message *m)
{
    size_t size = m->size < MESSAGE_TOP ? (size_t)m->size : MESSAGE_TOP;
    ssize_t n = -1;
    m->top = malloc(size);
    if (m->top)
        n = pread(m->fd, m->top, size, 0);
    m->top_len = n > 0 ? (size_t)n : 0;
}

void message_forget_top(struct message *m)
{
    free(m->top);
    m->top = NULL;
    m->top_len = 0;
}

/* Stores the state that must be the same when the last octet is sent and when the file is marked or removed. */
static void message_note_state(struct message *m, const struct stat *st)
{
    m->size = st->st_size;
    m->device = st->st_dev;
    m->inode = st->st_ino;
    m->arrived = st->st_mtim;
    m->changed = st->st_ctim;
}

/* ESTALE: on a network file system, another host has removed the file since this host read the directory. */
enum claim message_open(struct message *m, int queue, const char *path, int access)
{
    struct stat st;
    *m = (struct message){.queue = queue, .path = path, .fd = -1};
    m->fd = openat(queue, path, access | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0);
    if (m->fd < 0 && (errno == ELOOP || errno == EISDIR || errno == ENXIO))
        return message_hold(m, "not a regular file");
    if (m->fd < 0 && (errno == ENOENT || errno == ESTALE))
        return errno == ENOENT ? NOTHING : BUSY;
    if (m->fd < 0)
        return message_trouble(m, "it cannot be opened");
    if (fstat(m->fd, &st) < 0)
        return errno == ESTALE ? BUSY : message_trouble(m, "its state cannot be read");
    if (!S_ISREG(st.st_mode))
        return message_hold(m, "not a regular file");
    message_note_state(m, &st);
    return CLAIMED;
}

enum claim message_read(struct message *m)
{
    for (const char *p = m->path; *p != '/'; p++)
        if (isupper((unsigned char)*p))
            return message_hold(m, "its directory is not in lower case, and no ATRN looks there");
    return envelope_read(m);
}

/* Takes the Message-ID from a line of the header. The value may be on the line after the name. *named: the line belongs
 * to the Message-ID field. */
static void note_message_id(struct message *m, const char *line, bool *named)
{
    if (strncasecmp(line, "Message-ID:", 11) == 0) {
        *named = true;
        line += 11;
    } else if (*line != ' ' && *line != '\t') {
        *named = false;
    }
    line += strspn(line, " \t");
    if (*named && *line && !*m->id)
        snprintf(m->id, sizeof m->id, "%.*s", (int)strcspn(line, " \t"), line);
}

/* Reads the header for the Message-ID and for octets over 127. If there are any and they are valid UTF-8, the message
 * is one for SMTPUTF8 (RFC 6531). False: the header could not be read. */
static bool scan_header(struct message *m)
{
    struct line_reader r = {.of = m, .next_read = m->start};
    bool named = false, valid = true;
    while (next_line(&r) && r.line[0]) {
        size_t len = strlen(r.line);
        note_message_id(m, r.line, &named);
        m->utf8_header |= r.eight_bit;
        valid = valid && (!r.eight_bit || (!r.cut && utf8_prefix(r.line, len) == len));
    }
    m->utf8_header = m->utf8_header && valid;
    return !r.failed;
}

/* Counts of the line ends in the content. */
struct tally {
    uint64_t cr, lf, crlf;
    unsigned char all; /* all octets or-ed: over 127 if one of them is */
};

/* Counts in pieces so short that an octet can hold the count of one. The compiler can then count 16 or 32 octets at a
 * time. The last piece is filled up with zeros, which change no count. */
static void count_octets(struct tally *t, char data[COPY_SIZE], size_t len)
{
    enum { PIECE = 128 };
    _Static_assert(COPY_SIZE % PIECE == 0, "there is room for the last piece");
    size_t whole = (len + PIECE - 1) / PIECE * PIECE;
    memset(data + len, 0, whole - len);
    for (const char *p = data; p < data + whole; p += PIECE) {
        unsigned char cr = 0, lf = 0, all = 0;
        for (size_t i = 0; i < PIECE; i++) {
            cr += p[i] == '\r';
            lf += p[i] == '\n';
            all |= (unsigned char)p[i];
        }
        t->cr += cr;
        t->lf += lf;
        t->all |= all;
    }
}

/* Reads the content once before it is sent, because BDAT, SIZE and 8BITMIME are sent before the content. In the file a
 * line ends with LF, CRLF or a stray CR; on the wire it ends with CRLF. The size is therefore the octets that are
 * neither CR nor LF, plus two for each line. False: the content cannot be read, or its length changes; see errno. */
static bool message_scan(struct message *m)
{
    char data[COPY_SIZE];
    struct tally t = {0};
    off_t at = m->start;
    char last = '\n';
    ssize_t n;
    while ((n = message_octets(m, data, sizeof data, at)) > 0) {
        uint64_t cr_before = t.cr;
        count_octets(&t, data, (size_t)n);
        t.crlf += last == '\r' && data[0] == '\n';
        for (ssize_t i = 1; t.cr > cr_before && i < n; i++)
            t.crlf += data[i - 1] == '\r' && data[i] == '\n';
        last = data[n - 1];
        at += n;
    }
    m->wire_size = (uint64_t)(at - m->start) - t.cr - t.lf + 2 * (t.cr + t.lf - t.crlf);
    m->wire_size += last != '\n' && last != '\r' ? 2 : 0;
    m->lf_only = t.cr == 0;
    m->eight_bit = t.all > 127;
    if (n == 0 && at != m->size) { /* a program still writes to it, although it is in new */
        errno = EBUSY;
        return false;
    }
    return n == 0 && scan_header(m);
}

enum name_leads { HERE, ELSEWHERE, NOWHERE, UNKNOWN };

/* Where does the message's name lead now? The directory is opened again for this look-up. On a network file system only
 * that asks the server; a look-up of the whole path may be answered from this host's cache. *dir is the directory, or
 * -1 if it could not be opened; the caller closes it. *here is the state of the open file. UNKNOWN: see errno. */
static enum name_leads look_up(const struct message *m, int *dir, struct stat *here)
{
    char box[MAILDIR_PATH];
    struct stat there;
    snprintf(box, sizeof box, "%.*s", (int)box_len(m->path), m->path);
    *dir = openat(m->queue, box, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (*dir < 0 || fstat(m->fd, here) < 0 || fstatat(*dir, strrchr(m->path, '/') + 1, &there, AT_SYMLINK_NOFOLLOW) < 0)
        return errno == ENOENT ? NOWHERE : errno == ESTALE ? ELSEWHERE : UNKNOWN;
    if (there.st_ino != m->inode || there.st_dev != m->device)
        return ELSEWHERE;
    return there.st_nlink > 0 && there.st_nlink == here->st_nlink ? HERE : ELSEWHERE;
}

/* Claims an open file. Another session may have removed the file after it was opened here and before it was locked, so
 * the name is looked up again. */
static enum claim claim_file(struct message *m)
{
    struct stat st;
    enum name_leads where;
    int dir;
    if (flock(m->fd, LOCK_EX | LOCK_NB) < 0) {
        bool taken = errno == EWOULDBLOCK || errno == ESTALE || errno == ENOENT;
        return taken ? BUSY : message_trouble(m, "it cannot be locked");
    }
    where = look_up(m, &dir, &st);
    if (where == HERE)
        message_note_state(m, &st); /* another session may have struck out recipients */
    else if (where == UNKNOWN)
        message_trouble(m, "its name cannot be looked up");
    if (dir >= 0)
        close(dir);
    return where == HERE ? CLAIMED : where == NOWHERE ? NOTHING : BUSY;
}

enum claim message_claim(struct message *m, int queue, const char *path)
{
    enum claim result = message_open(m, queue, path, O_RDWR); /* NFS needs write access for an exclusive lock */
    if (result == CLAIMED)
        result = claim_file(m);
    if (result != CLAIMED)
        return result;
    message_keep_top(m);
    result = message_read(m);
    if (result == CLAIMED && !message_scan(m))
        result = message_trouble(m, "it cannot be read to its end");
    return result;
}

void message_close(struct message *m)
{
    if (m->fd >= 0)
        close(m->fd); /* this ends the claim */
    m->fd = -1;
    message_forget_top(m);
    forget_recipients(m);
    free(m->list);
    m->list = NULL;
    while (m->reasons) {
        struct reason *next = m->reasons->next;
        free(m->reasons);
        m->reasons = next;
    }
}

/* The state of the conversion to wire form, from one part of the content to the next. */
struct wire {
    bool dots;        /* a dot that starts a line is doubled, as DATA requires (RFC 5321, 4.5.2) */
    bool lf_only;     /* the content has no CR */
    uint64_t doubled; /* dots that were added, which are not part of the content */
    enum { LINE_START, IN_LINE, AFTER_CR } state;
};

/* Returns the first such octet at or after p, or the end. *found keeps the last result; it is NULL at first. While that
 * result is not before p, nothing is searched again, because there may be many CRs between two LFs, or none. */
static const char *next_octet(int octet, const char *p, const char *end, const char **found)
{
    if (!*found || *found < p) {
        *found = memchr(p, octet, (size_t)(end - p));
        *found = *found ? *found : end;
    }
    return *found;
}

/* Converts a part of the content to wire form: a line that ends with LF, CRLF or a stray CR ends with CRLF in out. An
 * octet becomes at most two, so out needs room for twice the part. Returns the number of octets in out. */
static size_t wire_form(struct wire *w, char *out, const char *part, size_t len)
{
    const char *p = part, *end = part + len, *lf = NULL, *cr = w->lf_only ? end : NULL;
    char *start = out;
    while (p < end) {
        const char *line_end;
        if (w->state == AFTER_CR && *p == '\n') { /* the CR has already become CRLF */
            w->state = LINE_START;
            p++;
            continue;
        }
        if (w->state != IN_LINE && w->dots && *p == '.') {
            *out++ = '.';
            w->doubled++;
        }
        line_end = next_octet('\n', p, end, &lf);
        if (next_octet('\r', p, end, &cr) < line_end)
            line_end = cr;
        memcpy(out, p, (size_t)(line_end - p));
        out += line_end - p;
        p = line_end;
        w->state = IN_LINE;
        if (p < end) {
            *out++ = '\r';
            *out++ = '\n';
            w->state = *p++ == '\r' ? AFTER_CR : LINE_START;
        }
    }
    return (size_t)(out - start);
}

/* A message in the queue changes only when this program strikes out recipients. If another program has written into the
 * file, the result of the scan is no longer valid. */
static bool unchanged(const struct message *m, const struct stat *now)
{
    return now->st_size == m->size && now->st_mtim.tv_sec == m->arrived.tv_sec &&
           now->st_mtim.tv_nsec == m->arrived.tv_nsec && now->st_ctim.tv_sec == m->changed.tv_sec &&
           now->st_ctim.tv_nsec == m->changed.tv_nsec;
}

/* Reads the next octets of the content, up to the end that the scan has found. -1: they cannot be read, or they are the
 * last and the file has changed. They must not be sent then, because with BDAT the last octet ends a message. */
static ssize_t scanned_octets(const struct message *m, char data[COPY_SIZE], off_t at)
{
    struct stat now;
    off_t left = m->size - at;
    ssize_t n = message_octets(m, data, left < COPY_SIZE ? (size_t)left : COPY_SIZE, at);
    if ((n == 0 && left > 0) || (n == left && (fstat(m->fd, &now) < 0 || !unchanged(m, &now))))
        return -1;
    return n;
}

/* The caller sends the lone dot that ends the content of DATA. False: the content could not be read, or it is not what
 * message_scan() has read. The caller must then break the connection instead of ending the message. */
bool message_send(const struct message *m, struct stream *to, bool dots)
{
    _Static_assert(COPY_SIZE % WIRE_PART == 0, "no part starts behind the buffer");
    char data[COPY_SIZE];
    struct wire w = {.dots = dots, .lf_only = m->lf_only, .state = LINE_START};
    uint64_t sent = 0;
    off_t at = m->start;
    do {
        ssize_t n = scanned_octets(m, data, at);
        if (n < 0)
            return false;
        at += n;
        for (char *part = data, *end = data + n; part < end; part += WIRE_PART) {
            size_t len = end - part < WIRE_PART ? (size_t)(end - part) : WIRE_PART;
            size_t made = wire_form(&w, stream_space(to, 2 * len), part, len);
            stream_add(to, made);
            sent += made;
        }
    } while (at < m->size && !to->broken);
    if (w.state == IN_LINE) {
        stream_write(to, "\r\n", 2);
        sent += 2;
    }
    return sent - w.doubled == m->wire_size;
}

/* Is the file in the queue still the one that is claimed, and unchanged since the scan? Results as of message_remove().
 * UPDATED with *dir -1: the name no longer exists. After this check another program can still replace the file before
 * the caller changes it, because no system call checks and removes in one step. */
static enum update still_the_same(struct message *m, int *dir)
{
    struct stat now;
    switch (look_up(m, dir, &now)) {
    case HERE:
        return unchanged(m, &now) ? UPDATED : REPLACED;
    case ELSEWHERE:
        return REPLACED;
    case NOWHERE:
        if (*dir >= 0)
            close(*dir);
        *dir = -1;
        return UPDATED;
    default:
        m->problem = errno;
        return FAILED;
    }
}

/* qmail marks recipients in the same way. The marks need no disk space, and the file keeps its inode and so the claim.
 * If the provider crashes here, the recipients that are not yet struck out get the message again. */
static bool write_marks(struct message *m)
{
    struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, m->arrived};
    struct stat st;
    for (size_t i = 0; i < m->recipients; i++) {
        const struct recipient *r = &m->list[i], *as = r->fate == REPEATED ? r->first : r;
        if ((as->fate == DELIVERED || as->fate == RETURNED) && pwrite(m->fd, "=", 1, r->at) != 1)
            return false;
    }
    futimens(m->fd, times); /* fails if another user owns the file; the marks are valid all the same */
    if (fsync(m->fd) < 0 || fstat(m->fd, &st) < 0)
        return false;
    message_note_state(m, &st);
    return true;
}

enum update message_strike_out(struct message *m)
{
    int dir;
    enum update result = still_the_same(m, &dir);
    if (result == UPDATED && dir >= 0 && !write_marks(m)) {
        m->problem = errno;
        result = FAILED;
    }
    if (dir >= 0)
        close(dir);
    return result;
}

enum update message_remove(struct message *m)
{
    int dir;
    enum update result = still_the_same(m, &dir);
    /* The directory is not flushed to disk. If the power fails before the kernel writes it, the message is in the queue
     * again and is sent a second time. It is never lost. */
    if (result == UPDATED && dir >= 0 && unlinkat(dir, strrchr(m->path, '/') + 1, 0) < 0 && errno != ENOENT) {
        m->problem = errno;
        result = FAILED;
    }
    if (dir >= 0)
        close(dir);
    return result;
}

/* ==== 8. The queue: delivery into a Maildir ==========================================================
 *
 * The customer and enqueue write the form that the provider reads: the envelope, then the message. A delivery is one
 * file in tmp. It becomes mail when the file is flushed to disk, renamed into new, and the directory is flushed too.
 * RFC 5321, 6.1, requires this: mail that was accepted must not be lost. */

#define DELIVERY_PATH 448 /* octets of domain/new/name */

static bool sync_directory(int queue, const char *path)
{
    int fd = openat(queue, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bool done = fd >= 0 && fsync(fd) == 0;
    if (fd >= 0)
        close(fd);
    return done;
}

static atomic_uint names_given; /* by this process; the number tells names of the same microsecond apart */

/* Makes a name that no other file in any Maildir has: the time, its microseconds, the process, a number, 64 random
 * bits, the host. Two hosts, or two containers of one host, can differ in the random bits alone. */
static void unique_name(char *out, size_t size)
{
    struct timespec t;
    uint64_t random = 0;
    char host[64] = "localhost";
    RAND_bytes((unsigned char *)&random, sizeof random);
    gethostname(host, sizeof host - 1);
    for (char *p = host; *p; p++)
        if (*p == '/' || *p == ':')
            *p = '_';
    clock_gettime(CLOCK_REALTIME, &t);
    snprintf(out, size, "%lld.M%06ldP%ldQ%uR%016llx.%s", (long long)t.tv_sec, t.tv_nsec / 1000, (long)getpid(),
             atomic_fetch_add(&names_given, 1), (unsigned long long)random, host);
}

/* Makes the missing directories of a Maildir and flushes them to disk, as the mail in them will be. maildir is a
 * domain, or a folder of a domain. */
static bool maildir_make(int queue, const char *maildir)
{
    static const char *const box[] = {"", "/tmp", "/new", "/cur"};
    const char *slash = strchr(maildir, '/');
    char path[MAILDIR_PATH], parent[MAILDIR_PATH] = ".";
    bool made = false;
    for (size_t i = 0; i < sizeof box / sizeof *box; i++) {
        snprintf(path, sizeof path, "%s%s", maildir, box[i]);
        if (mkdirat(queue, path, 0700) == 0)
            made = true;
        else if (errno != EEXIST)
            return false;
    }
    if (slash)
        snprintf(parent, sizeof parent, "%.*s", (int)(slash - maildir), maildir);
    return !made || (sync_directory(queue, maildir) && sync_directory(queue, parent));
}

/* The first file keeps the result for all files of a message, because all of them become mail or none does. */
static struct delivery *first_of_message(struct delivery *d)
{
    while (d->same_message)
        d--;
    return d;
}

/* For `return`: stores the first reason of a failure and returns false. */
static bool delivery_failed(struct delivery *d)
{
    struct delivery *first = first_of_message(d);
    if (first->problem == 0)
        first->problem = errno ? errno : EIO;
    return false;
}

bool delivery_open(struct delivery *d, int queue, const char *domain)
{
    char path[DELIVERY_PATH];
    int fd;

    *d = (struct delivery){.queue = queue};
    snprintf(d->domain, sizeof d->domain, "%s", domain);
    if (!strchr(domain, '/'))
        lower_case(d->domain);
    unique_name(d->name, sizeof d->name);
    if (!maildir_make(queue, d->domain))
        return delivery_failed(d);

    snprintf(path, sizeof path, "%s/tmp/%s", d->domain, d->name);
    fd = openat(queue, path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    d->file = fd < 0 ? NULL : fdopen(fd, "w");
    if (d->file)
        return true;
    delivery_failed(d);
    if (fd >= 0) {
        close(fd);
        unlinkat(queue, path, 0);
    }
    return false;
}

void deliveries_discard(struct delivery *d, size_t count)
{
    char path[DELIVERY_PATH];
    for (; count > 0; count--, d++) {
        if (d->file)
            fclose(d->file);
        d->file = NULL;
        snprintf(path, sizeof path, "%s/%s/%s", d->domain, d->published ? "new" : "tmp", d->name);
        unlinkat(d->queue, path, 0);
    }
}

size_t deliveries_open(struct delivery *d, int queue, const char *sender, char *const *recipients, size_t count)
{
    size_t files = 0;
    for (size_t i = 0; i < count; i++) {
        const char *domain = mailbox_domain(recipients[i]);
        size_t f = 0;
        while (f < files && strcasecmp(d[f].domain, domain) != 0)
            f++;
        if (f == files) {
            if (!delivery_open(&d[f], queue, domain)) {
                d->problem = d[f].problem;
                deliveries_discard(d, files);
                return 0;
            }
            d[f].same_message = f > 0;
            fprintf(d[f].file, "Return-Path: <%s>\n", sender);
            files++;
        }
        fprintf(d[f].file, "Delivered-To: %s\n", recipients[i]);
    }
    return files;
}

static bool delivery_written(struct delivery *d)
{
    return (fflush(d->file) == 0 && !ferror(d->file)) || delivery_failed(d);
}

bool deliveries_written(struct delivery *d, size_t count)
{
    for (size_t i = 0; i < count; i++)
        if (!delivery_written(&d[i]))
            return false;
    return count > 0;
}

/* Flushes the content to disk and closes the file. */
static void delivery_sync(struct delivery *d)
{
    if (delivery_written(d) && fsync(fileno(d->file)) < 0)
        delivery_failed(d);
    if (fclose(d->file) != 0)
        delivery_failed(d);
    d->file = NULL;
}

static void delivery_publish(struct delivery *d)
{
    char from[DELIVERY_PATH], to[DELIVERY_PATH];
    snprintf(from, sizeof from, "%s/tmp/%s", d->domain, d->name);
    snprintf(to, sizeof to, "%s/new/%s", d->domain, d->name);
    d->published = renameat(d->queue, from, d->queue, to) == 0;
    if (!d->published)
        delivery_failed(d);
}

/* Flushes the directory of d[last] to disk, unless this was done for another file in it. */
static void box_sync(struct delivery *d, size_t last)
{
    char box[DELIVERY_PATH];
    for (size_t i = 0; i < last; i++)
        if (first_of_message(&d[i])->problem == 0 && strcmp(d[i].domain, d[last].domain) == 0)
            return;
    snprintf(box, sizeof box, "%s/new", d[last].domain);
    if (!sync_directory(d[last].queue, box))
        delivery_failed(&d[last]);
}

bool deliveries_store(struct delivery *d, size_t count)
{
    bool all = true;
    for (size_t i = 0; i < count; i++) /* Linux starts to write all files before the first fsync() waits */
        if (delivery_written(&d[i]))
            posix_fadvise(fileno(d[i].file), 0, 0, POSIX_FADV_DONTNEED);
    for (size_t i = 0; i < count; i++)
        delivery_sync(&d[i]);

    for (size_t i = 0; i < count; i++)
        if (first_of_message(&d[i])->problem == 0)
            delivery_publish(&d[i]);
    for (size_t i = 0; i < count; i++)
        if (first_of_message(&d[i])->problem == 0)
            box_sync(d, i);
    for (size_t i = 0; i < count; i++)
        all = all && d[i].problem == 0;
    return all;
}

/* ---- Mail that is returned to nobody ---- */

/* Writes an envelope of the refused recipients and the unchanged content. The copy has the same time of arrival. */
static bool write_refused(const struct message *m, FILE *out)
{
    struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, m->arrived};
    char data[COPY_SIZE];
    off_t at = m->start;
    ssize_t n;
    fprintf(out, "Return-Path: <%s>\n", m->sender);
    for (size_t i = 0; i < m->recipients; i++)
        if (m->list[i].fate == REFUSED)
            fprintf(out, "Delivered-To: %s\n", m->list[i].address);
    while ((n = message_octets(m, data, sizeof data, at)) > 0) {
        fwrite(data, 1, (size_t)n, out);
        at += n;
    }
    return n == 0 && fflush(out) == 0 && !ferror(out) && futimens(fileno(out), times) == 0;
}

bool message_set_aside(const struct message *m)
{
    char folder[MAILDIR_PATH], path[MAILDIR_PATH + sizeof "/maildirfolder"];
    struct delivery d;
    int fd;
    snprintf(folder, sizeof folder, "%.*s/%s", (int)strcspn(m->path, "/"), m->path, UNDELIVERABLE);
    if (!delivery_open(&d, m->queue, folder))
        return false;
    if (!write_refused(m, d.file) || !deliveries_store(&d, 1)) {
        deliveries_discard(&d, 1);
        return false;
    }
    snprintf(path, sizeof path, "%s/maildirfolder", folder); /* Maildir++: this file marks a folder */
    fd = openat(m->queue, path, O_WRONLY | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd >= 0)
        close(fd);
    return true;
}

/* ==== 9. Handing the session on: --smtp and --exec ===================================================
 *
 * The receiver is the customer's own mail server and speaks SMTP. Its connection and the provider's are therefore
 * joined, and every octet passes unchanged. The relay follows the dialogue for the trace, for the count of messages and
 * to recognise a proper end. If the provider uses the receiver's STARTTLS, the relay cannot see the rest. */

#define FINAL_REPLY_TIMEOUT 600  /* RFC 5321, 4.5.3.2.6: seconds for the reply to the last octet of a message */
#define PASSING_MAX 1024         /* replies that the relay of --smtp and --exec can await */

/* What a reply decides. */
enum awaited { ANY_REPLY, DATA_REPLY, CONTENT_REPLY, STARTTLS_REPLY, QUIT_REPLY };

struct relay {
    struct session *s;
    struct stream *from[2]; /* the provider's stream and the receiver's */
    bool over[2];           /* this side sends nothing more, and its end was passed on */
    enum side first_over;

    char line[2][COMMAND_LINE + 1]; /* the line under way from each side */
    size_t len[2];
    enum awaited awaited[PASSING_MAX]; /* the replies still due, from the oldest on */
    size_t oldest, count;
    bool in_mail;
    bool hidden;            /* the two speak TLS with each other from here on */
    bool quit;              /* QUIT was answered */
    struct content data;    /* what follows DATA; no file is written, only its end is found */
    uint64_t octets, chunk; /* octets of data so far; octets of a BDAT still to come */
    size_t messages;
    uint64_t passed; /* octets from the provider to the receiver */
};

/* ---- What passes, followed for the trace and the count ---- */

static void await_reply(struct relay *r, enum awaited what)
{
    if (r->count < PASSING_MAX)
        r->awaited[(r->oldest + r->count++) % PASSING_MAX] = what;
}

/* Returns the clause of the reply to the oldest command or, in a reply to EHLO, the clause of the keyword. */
static const char *awaited_clause(const struct relay *r, const char *line)
{
    static const char *const clause[] = {[ANY_REPLY] = "5.3-c,4-e", [DATA_REPLY] = "5.3-c,4-e", [CONTENT_REPLY] = "4-e",
                                         [STARTTLS_REPLY] = "RFC 3207", [QUIT_REPLY] = "5-b"};
    enum awaited what = r->awaited[r->oldest];
    const char *keyword = what == ANY_REPLY && strlen(line) > 4 ? keyword_clause(line + 4) : NULL;
    return keyword ? keyword : r->count > 0 ? clause[what] : NULL;
}

static void follow_command(struct relay *r, const char *line)
{
    enum awaited reply = ANY_REPLY;
    trace_line(r->s, PROVIDER, NULL, "%s", line);
    if (strncasecmp(line, "MAIL ", 5) == 0) {
        r->in_mail = true;
    } else if (strcasecmp(line, "RSET") == 0) {
        r->in_mail = false;
    } else if (strcasecmp(line, "DATA") == 0) {
        reply = DATA_REPLY;
    } else if (strncasecmp(line, "BDAT ", 5) == 0) {
        r->chunk = strtoull(line + 5, NULL, 10);
        trace_line(r->s, PROVIDER, "5.3-c", "... %llu octets of message ...", (unsigned long long)r->chunk);
        reply = strcasestr(line, " LAST") ? CONTENT_REPLY : ANY_REPLY;
    } else if (strcasecmp(line, "STARTTLS") == 0) {
        reply = STARTTLS_REPLY;
    } else if (strcasecmp(line, "QUIT") == 0) {
        reply = QUIT_REPLY;
    }
    await_reply(r, reply);
}

static void follow_reply(struct relay *r, const char *line)
{
    enum awaited what;
    trace_line(r->s, CUSTOMER, awaited_clause(r, line), "%s", line);
    if (r->count == 0 || strlen(line) < 3 || line[3] == '-')
        return;
    what = r->awaited[r->oldest];
    r->oldest = (r->oldest + 1) % PASSING_MAX;
    r->count--;

    if (what == DATA_REPLY && line[0] == '3') {
        r->data = (struct content){.under_way = true, .dots = true};
    } else if (what == CONTENT_REPLY) {
        r->messages += line[0] == '2';
        r->in_mail &= r->count > 0;
    } else if (what == STARTTLS_REPLY && line[0] == '2') {
        r->hidden = true;
        trace_line(r->s, CUSTOMER, NULL,
                   "(from here on the two speak TLS with each other, and nothing more can be seen)");
    }
    r->quit |= what == QUIT_REPLY;
}

/* Follows the octets after DATA. Returns how many of them belong to the content, including the lone dot. */
static size_t follow_data(struct relay *r, const char *data, size_t len)
{
    size_t taken = content_take(&r->data, data, len);
    r->octets += taken;
    if (r->data.ended) {
        trace_line(r->s, PROVIDER, "5.3-c", "... %llu octets of message ...", (unsigned long long)r->octets - LONE_DOT);
        trace_line(r->s, PROVIDER, "4-e", ".");
        await_reply(r, CONTENT_REPLY);
        r->data = (struct content){.under_way = false};
        r->octets = 0;
    }
    return taken;
}

/* Follows what one side has sent. */
static void follow(struct relay *r, enum side side, const char *data, size_t len)
{
    char *line = r->line[side];
    size_t *end = &r->len[side];
    while (len > 0 && !r->hidden) {
        size_t n = 1;
        if (side == PROVIDER && r->chunk > 0) {
            n = len < r->chunk ? len : (size_t)r->chunk;
            r->chunk -= n;
        } else if (side == PROVIDER && r->data.under_way) {
            n = follow_data(r, data, len);
        } else if (*data != '\n') {
            if (*end < COMMAND_LINE)
                line[(*end)++] = *data;
        } else {
            while (*end > 0 && strchr(" \t\r", line[*end - 1])) /* "DATA " is DATA (RFC 5321, 4.1.1) */
                (*end)--;
            line[*end] = '\0';
            *end = 0;
            if (side == PROVIDER)
                follow_command(r, line);
            else
                follow_reply(r, line);
        }
        data += n;
        len -= n;
    }
}

/* ---- The two directions ---- */

/* Passes on what has arrived from one side, and then its end. The other side may still send its replies. If writing to
 * the receiver fails, the provider's side is over too. False: nothing has arrived. */
static bool pass_on(struct relay *r, enum side side)
{
    struct stream *from = r->from[side], *to = r->from[other_side(side)];
    size_t passed = 0, len;
    const char *data;
    if (r->over[side])
        return false;
    while (passed < STREAM_OUT && stream_ready(from) && !stream_over(from) && stream_peek(from, &data, &len)) {
        follow(r, side, data, len);
        stream_write(to, data, len);
        stream_skip(from, len);
        passed += len;
    }
    stream_flush(to);
    r->passed += side == PROVIDER ? passed : 0;
    show_progress(r->s, r->messages, r->passed);

    r->over[side] = stream_over(from) || (side == PROVIDER && to->broken);
    if (r->over[side]) {
        if (!r->over[other_side(side)])
            r->first_over = r->from[CUSTOMER]->broken ? CUSTOMER : side;
        stream_end(to);
    }
    return passed > 0 || r->over[side];
}

/* Waits for input or a signal. The time-out is at least FINAL_REPLY_TIMEOUT for the reply to the last octet of a
 * message and, if the dialogue is hidden, for all input. False: both sides have been silent for too long since then. */
static bool wait_for_either(const struct relay *r, int64_t since)
{
    struct pollfd p[3] = {[2] = {.fd = customer_stops ? -1 : stop_pipe[0], .events = POLLIN}};
    bool final = r->hidden || (r->count > (r->chunk > 0) && r->awaited[r->oldest] == CONTENT_REPLY);
    int seconds = final && r->s->io.timeout < FINAL_REPLY_TIMEOUT ? FINAL_REPLY_TIMEOUT : r->s->io.timeout;
    int64_t left = since + (int64_t)seconds * 1000 - now_ms();
    for (int side = 0; side < 2; side++)
        p[side] = (struct pollfd){.fd = r->over[side] ? -1 : r->from[side]->fd, .events = POLLIN};
    if (left > 0)
        poll(p, 3, (int)left);
    return left > 0;
}

/* Joins the two connections until both are over, or one of them after QUIT was answered. */
static void join_streams(struct relay *r)
{
    int64_t since = now_ms();
    enter_state(r->s, REVERSED);
    r->s->io.wake_fd = -1;
    while (r->over[PROVIDER] + r->over[CUSTOMER] < (r->quit ? 1 : 2)) {
        bool moved;
        if (customer_stops && (r->hidden || (!r->in_mail && r->count == 0))) {
            r->quit = true;
            end_with_421(r->s, "this server is shutting down");
            break;
        }
        moved = pass_on(r, CUSTOMER);
        moved |= pass_on(r, PROVIDER);
        if (moved) {
            since = now_ms();
        } else if (!wait_for_either(r, since)) {
            stream_break(&r->s->io, "both sides were silent for longer than --timeout");
            r->first_over = PROVIDER;
            break;
        }
    }
}

/* Passes on a reply of the receiver that the customer has read. */
static void pass_reply(struct session *s, const struct reply *r)
{
    for (const char *line = r->text; line; line = strchr(line, '\n')) {
        line += *line == '\n';
        reply(s, "5.3-b", "%d%c%.*s", r->code, strchr(line, '\n') ? '-' : ' ', (int)strcspn(line, "\n"), line);
    }
}

static int relay_mail(struct session *s, struct receiver *receiver)
{
    struct relay *r = must_alloc(calloc(1, sizeof *r));
    struct session *gone; /* the side to report if the session had no proper end */
    int code;
    r->s = s;
    r->from[PROVIDER] = &s->io;
    r->from[CUSTOMER] = &receiver->session->io;
    pass_reply(s, &receiver->greeting); /* read before ATRN was sent; now it is the customer's first line (5.3-b) */
    join_streams(r);

    gone = r->first_over == PROVIDER ? s : receiver->session;
    if (r->hidden) {
        r->quit = stream_closed_by_peer(&s->io) && stream_closed_by_peer(&receiver->session->io);
        log_event(s, LOG_INFO, "the provider and the mail server use TLS: the number of messages is unknown");
    }
    if (gone->io.ended)
        stream_break(&gone->io, gone->io.ended);
    code = session_outcome(gone, r->quit, r->hidden ? 1 : r->messages, 0);
    show_summary(s, "handed on", r->messages, r->passed);
    free(r);
    return code;
}

/* ---- The receiver ---- */

/* Starts COMMAND with one end of a socket pair as its standard input and output. Returns the other end, or -1. The
 * buffer must hold all the replies that a provider leaves unread while it writes; see part 3. */
static int start_receiver(const char *command, pid_t *pid)
{
    char *const argv[] = {"/bin/sh", "-c", (char *)command, NULL};
    int pair[2], problem;
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0)
        return -1;
    setsockopt(pair[1], SOL_SOCKET, SO_SNDBUF, &(int){RECEIVE_BUFFER}, sizeof(int));
    problem = start_program(argv, pair[1], pair[1], pid);
    close(pair[1]);
    if (problem)
        close(pair[0]);
    return problem ? -1 : pair[0];
}

int reach_receiver(const struct customer *c, struct receiver *receiver, const char *consequence)
{
    const char *where = c->smtp ? c->smtp : c->exec;
    int code = EX_TEMPFAIL;
    int fd = c->smtp ? connect_to(c->smtp, "25", c->timeout, &code) : start_receiver(c->exec, &receiver->child);
    if (fd < 0) {
        log_event(NULL, LOG_ERR, "%s cannot be reached; %s", where, consequence);
        return code == EX_NOHOST || code == EX_USAGE ? code : EX_TEMPFAIL;
    }
    receiver->session = must_alloc(session_new(fd, PROVIDER, c->timeout, c->name, TRACE_OFF));
    if (read_reply(receiver->session, "5.3-b", &receiver->greeting) && receiver->greeting.code == 220)
        return EX_OK;
    log_event(NULL, LOG_ERR, "%s does not take mail (%s); %s", where,
              receiver->session->io.broken ? receiver->session->io.broken : receiver->greeting.text, consequence);
    return EX_TEMPFAIL;
}

void leave_receiver(const struct customer *c, struct receiver *receiver)
{
    bool greeted = receiver->session && receiver->greeting.code == 220;
    if (receiver->session)
        stream_close(&receiver->session->io);
    free(receiver->session);
    if (receiver->child > 0)
        finish_program(receiver->child, greeted && !customer_stops ? c->timeout : 0);
    *receiver = (struct receiver){.session = NULL};
}

/* If the receiver has closed the connection or sent 421 since its greeting, it is connected or started again first. */
int hand_session_on(struct session *s, const struct customer *c, struct receiver *receiver)
{
    if (stream_ready(&receiver->session->io)) {
        leave_receiver(c, receiver);
        if (reach_receiver(c, receiver, "the mail stays with the provider") != EX_OK) {
            reply(s, NULL, "421 4.3.2 %s: the receiver has gone, closing connection", s->name);
            return EX_TEMPFAIL;
        }
    }
    return relay_mail(s, receiver);
}

/* ==== 10. Accounts ===================================================================================
 *
 * The accounts file has one line for each customer: name:domain[,domain...]:secret. The provider reads the whole file
 * at the start and at SIGHUP. Sessions hold a reference to the table that they use, so a new table can replace it
 * at any time. AUTH and ATRN use the newest table. */

#define ACCOUNTS_STEP 64

static void account_free(struct account *a)
{
    if (a->secret)
        OPENSSL_cleanse(a->secret, strlen(a->secret));
    free(a->name);
    free(a->domains);
    free(a->secret);
}

void accounts_release(struct accounts *all)
{
    if (!all || atomic_fetch_sub(&all->users, 1) > 1)
        return;
    for (size_t i = 0; i < all->count; i++)
        account_free(&all->list[i]);
    free(all->list);
    free(all);
}

const char *next_domain(const char **list, size_t *len)
{
    const char *domain = *list;
    if (!domain)
        return NULL;
    *len = strcspn(domain, ",");
    *list = domain[*len] ? domain + *len + 1 : NULL;
    return domain;
}

bool domain_list_valid(const char *list)
{
    const char *domain;
    size_t len;
    while ((domain = next_domain(&list, &len)))
        if (!domain_valid(domain, len))
            return false;
    return true;
}

bool domain_in_list(const char *list, const char *domain, size_t len)
{
    const char *one;
    size_t n;
    while ((one = next_domain(&list, &n)))
        if (n == len && strncasecmp(one, domain, n) == 0)
            return true;
    return false;
}

/* Orders domains; equal ones keep their order in the list. */
static int by_domain(const void *left, const void *right)
{
    const char *a = *(char *const *)left, *b = *(char *const *)right;
    int order = strcmp(a, b);
    return order ? order : (a > b) - (a < b);
}

void tidy_domains(char *list)
{
    const char *end = list + strlen(list);
    size_t count = 0, kept = 0;
    char **domains;
    lower_case(list);
    for (const char *p = list; p < end; p++)
        count += *p == ',';
    if (!(domains = malloc((count + 1) * sizeof *domains)))
        return;
    count = 0;
    for (char *next = list; next;)
        domains[count++] = strsep(&next, ",");
    qsort(domains, count, sizeof *domains, by_domain);
    while (--count > 0)
        if (strcmp(domains[count - 1], domains[count]) == 0)
            domains[count][0] = ','; /* struck out */
    free(domains);
    for (size_t at = 0, len; list + at < end; at += len + 1) {
        len = strlen(list + at);
        if (list[at] != ',') {
            memmove(list + kept, list + at, len);
            kept += len;
            list[kept++] = ',';
        }
    }
    list[kept - 1] = '\0';
}

static int by_name(const void *left, const void *right)
{
    const struct account *a = left, *b = right;
    return strcmp(a->name, b->name);
}

static int by_iterations(const void *left, const void *right)
{
    const struct account *a = left, *b = right;
    return a->iterations - b->iterations;
}

/* Returns the iteration count that most verifiers have; if several are equally frequent, the lowest. A client whose
 * name has no verifier gets this count too. Sorts the list. */
static int common_iterations(struct accounts *all)
{
    size_t most = 0, run = 0;
    int common = SCRAM_ITERATIONS;
    qsort(all->list, all->count, sizeof *all->list, by_iterations);
    for (size_t i = 0; i < all->count; i++) {
        run = i > 0 && all->list[i].iterations == all->list[i - 1].iterations ? run + 1 : 1;
        if (all->list[i].iterations > 0 && run > most) {
            most = run;
            common = all->list[i].iterations;
        }
    }
    return common;
}

const struct account *account_find(const struct accounts *all, const char *name)
{
    struct account wanted = {.name = (char *)name};
    return all->count ? bsearch(&wanted, all->list, all->count, sizeof wanted, by_name) : NULL;
}

/* True, with the verifier in *v, if the account has a verifier instead of a secret. */
bool account_verifier(const struct account *a, struct verifier *v)
{
    size_t n = strlen(SCRAM_SCHEME);
    return a && strncmp(a->secret, SCRAM_SCHEME, n) == 0 && verifier_parse(a->secret + n, v);
}

/* Parses one line. Returns what is wrong with it, or NULL. */
static const char *account_parse(struct accounts *all, char *line, size_t number)
{
    char *domains = strchr(line, ':');
    char *secret = domains ? strchr(domains + 1, ':') : NULL;
    struct verifier verifier = {.iterations = 0};
    struct account *a;
    if (!secret)
        return "not of the form name:domain[,domain...]:secret";
    *domains++ = *secret++ = '\0';
    if (*line == '\0')
        return "the name is missing";
    if (!domain_list_valid(domains))
        return "not a list of domains, each of two labels or more, with commas and without blanks";
    if (*secret == '\0')
        return "the secret is missing";
    if (strncmp(secret, SCRAM_SCHEME, strlen(SCRAM_SCHEME)) == 0 &&
        !verifier_parse(secret + strlen(SCRAM_SCHEME), &verifier))
        return "not a verifier: " SCRAM_SCHEME "iterations,salt,StoredKey,ServerKey (RFC 5803)";
    if (all->count % ACCOUNTS_STEP == 0) {
        a = realloc(all->list, (all->count + ACCOUNTS_STEP) * sizeof *a);
        if (!a)
            return "out of memory";
        all->list = a;
    }
    tidy_domains(domains);
    a = &all->list[all->count];
    *a = (struct account){.name = strdup(line), .domains = strdup(domains), .secret = strdup(secret),
                          .iterations = verifier.iterations, .line = number};
    all->count++;
    return a->name && a->domains && a->secret ? NULL : "out of memory";
}

static struct accounts *accounts_read(FILE *file, const char *path, char *why, size_t why_size)
{
    struct accounts *all = calloc(1, sizeof *all);
    const char *wrong = all ? NULL : "out of memory";
    char *line = NULL;
    size_t size = 0, number = 0;
    ssize_t len;
    if (all)
        atomic_init(&all->users, 1);
    while (!wrong && (len = getline(&line, &size, file)) >= 0) {
        number++;
        if ((size_t)len != strlen(line))
            wrong = "a NUL octet in it";
        else if (line[len - 1] != '\n')
            wrong = "the line has no end: the file was cut, or is not yet written";
        else if (number == 1 && strncmp(line, BYTE_ORDER_MARK, 3) == 0)
            wrong = "a byte order mark in front; save the file as UTF-8 without it";
        else if (strcspn(line, "\r") < (size_t)len - 1 - (len > 1 && line[len - 2] == '\r'))
            wrong = "a CR in it that ends no line; lines end with LF or CRLF";
        line[strcspn(line, "\r\n")] = '\0';
        if (!wrong && line[0] != '\0' && line[0] != '#')
            wrong = account_parse(all, line, number);
    }
    if (!wrong && !feof(file)) /* getline() also fails when memory is short */
        wrong = "cannot be read to its end";
    if (!wrong && all->count > 0) {
        all->iterations = common_iterations(all);
        qsort(all->list, all->count, sizeof *all->list, by_name);
        for (size_t i = 1; i < all->count && !wrong; i++)
            if (by_name(&all->list[i - 1], &all->list[i]) == 0) {
                wrong = "this name has another line already";
                number = all->list[i].line > all->list[i - 1].line ? all->list[i].line : all->list[i - 1].line;
            }
    }
    if (line)
        OPENSSL_cleanse(line, size);
    free(line);
    if (!wrong)
        return all;
    snprintf(why, why_size, "%s:%zu: %s", path, number, wrong);
    accounts_release(all);
    return NULL;
}

/* Makes the key for the salts of names without a verifier. The key lasts as long as the file, as the verifiers' salts
 * do. It is not made from the secrets, because any client can ask for a salt and could then test secrets offline. */
static bool accounts_key(struct accounts *all, const struct stat *st)
{
    char text[96];
    snprintf(text, sizeof text, "%ju %jd.%09ld", (uintmax_t)st->st_ino, (intmax_t)st->st_mtim.tv_sec,
             st->st_mtim.tv_nsec);
    return hmac_sha256((const unsigned char *)"salt", 4, text, all->salt_key);
}

struct accounts *accounts_load(const char *path, char *why, size_t why_size)
{
    struct accounts *all = NULL;
    struct stat st;
    int fd = open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    FILE *file = NULL;
    if (fd < 0 || fstat(fd, &st) < 0)
        snprintf(why, why_size, "cannot open the accounts file %s (--accounts): %s", path,
                 errno == ELOOP ? "it is a symbolic link; name the file itself" : strerror(errno));
    else if (!S_ISREG(st.st_mode))
        snprintf(why, why_size, "%s: not a regular file", path);
    else if (st.st_mode & (S_IRWXG | S_IRWXO))
        snprintf(why, why_size, "%s: others than its owner may use it; do: chmod 600 %s", path, path);
    else if (!(file = fdopen(fd, "r")))
        snprintf(why, why_size, "%s: %s", path, strerror(errno));
    else
        all = accounts_read(file, path, why, why_size);
    if (all && !accounts_key(all, &st)) {
        snprintf(why, why_size, "%s: OpenSSL cannot compute HMAC-SHA-256", path);
        accounts_release(all);
        all = NULL;
    }
    if (file)
        fclose(file);
    else if (fd >= 0)
        close(fd);
    return all;
}

/* ==== 11. Lines and replies ==========================================================================
 *
 * The dialogue consists of lines. send_text() sends all of them and read_line() reads all of them, so the trace can
 * show each. A reply is validated before it is used. */

#define SEND_LINE (AUTH_LINE + 64) /* octets of the longest line that we send, without CRLF */
#define REPLY_LINE 2046          /* RFC 5321, 4.5.3.1.5 says 512 with CRLF; some servers send more */
#define REPLY_LINES 128          /* no reply needs more lines */
#define REPLY_TIMEOUT 600        /* seconds, at most, from the first line of a reply to its last */

void address_text(char *out, size_t size, const struct sockaddr_storage *a, socklen_t len)
{
    char host[64], port[16];
    if ((a->ss_family != AF_INET && a->ss_family != AF_INET6) ||
        getnameinfo((const struct sockaddr *)a, len, host, sizeof host, port, sizeof port,
                    NI_NUMERICHOST | NI_NUMERICSERV) != 0)
        snprintf(out, size, "local program");
    else
        snprintf(out, size, strchr(host, ':') ? "[%s]:%s" : "%s:%s", host, port);
}

struct session *session_new(int fd, enum side self, int timeout, const char *name, enum trace trace)
{
    static atomic_ulong numbers[2]; /* of each side's sessions */
    struct sockaddr_storage address = {.ss_family = AF_UNSPEC};
    socklen_t len = sizeof address;
    struct session *s = malloc(sizeof *s);
    if (!s)
        return NULL;
    memset(s, 0, offsetof(struct session, io));
    stream_init(&s->io, fd, timeout);
    s->number = atomic_fetch_add(&numbers[self], 1) + 1;
    s->self = self;
    s->name = name;
    s->trace = trace;
    snprintf(s->peer_name, sizeof s->peer_name, "unknown");
    getpeername(fd, (struct sockaddr *)&address, &len);
    address_text(s->peer, sizeof s->peer, &address, len);
    return s;
}

enum side other_side(enum side side)
{
    return side == PROVIDER ? CUSTOMER : PROVIDER;
}

__attribute__((format(printf, 3, 0)))
static void send_text(struct session *s, const char *clause, const char *fmt, va_list args)
{
    char line[SEND_LINE + 3];
    int n = vsnprintf(line, SEND_LINE + 1, fmt, args);
    if (n < 0 || n > SEND_LINE) {
        stream_break(&s->io, "a line of ours would have been too long");
        return;
    }
    trace_line(s, s->self, clause, "%s", line);
    memcpy(line + n, "\r\n", 3);
    stream_write(&s->io, line, (size_t)n + 2);
}

void command(struct session *s, const char *clause, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    send_text(s, clause, fmt, args);
    va_end(args);
}

void reply(struct session *s, const char *clause, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    send_text(s, clause, fmt, args);
    va_end(args);
}

void reply_bad_command(struct session *s, const char *clause, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    send_text(s, clause, fmt, args);
    va_end(args);
    s->bad_commands++;
}

bool read_line(struct session *s)
{
    return stream_read_line(&s->io, s->line, sizeof s->line, &s->line_len);
}

/* Splits a command in place. s->line keeps the verb, and s->argument is the text after the first blank, or NULL. Blanks
 * at the end are removed (RFC 5321, 4.1.1), except from ATRN, whose syntax does not allow them. */
void split_command(struct session *s)
{
    char *blank = strchr(s->line, ' ');
    s->argument = NULL;
    if (strncasecmp(s->line, "ATRN ", 5) != 0)
        while (s->line_len > 0 && s->line[s->line_len - 1] == ' ')
            s->line[--s->line_len] = '\0';
    if (blank && *blank == ' ') {
        *blank = '\0';
        s->argument = blank + 1;
    }
}

bool verb_is(const struct session *s, const char *verb)
{
    return strcasecmp(s->line, verb) == 0;
}

/* RFC 5321, 4.2: three digits, then a blank, a hyphen (more lines follow) or the end of the line. */
static bool reply_line_valid(const char *line, size_t len)
{
    return len >= 3 && len == strlen(line) && line[0] >= '2' && line[0] <= '5' && line[1] >= '0' &&
           line[1] <= '5' && isdigit((unsigned char)line[2]) &&
           (line[3] == '\0' || line[3] == ' ' || line[3] == '-');
}

const char *keyword_clause(const char *line)
{
    static const char *const known[][2] = {
        {"ATRN", "5.1.1-b"}, {"AUTH", "5.1.1-b"}, {"STARTTLS", "RFC 3207"}, {"PIPELINING", "RFC 2920"},
        {"CHUNKING", "RFC 3030"}, {"8BITMIME", "RFC 6152"}, {"SMTPUTF8", "RFC 6531"}, {"SIZE", "RFC 1870"},
        {"LIMITS", "RFC 9422"}, {"ENHANCEDSTATUSCODES", "RFC 2034"},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strncasecmp(line, known[i][0], strlen(known[i][0])) == 0)
            return known[i][1];
    return NULL;
}

/* Reads the lines of a reply. The first line has the whole time-out. All others together have the rest of it, and no
 * more than REPLY_TIMEOUT, because a peer could otherwise send a reply line by line without end. */
static bool read_reply_lines(struct session *s, const char *clause, struct reply *r, bool ehlo)
{
    size_t used = 0;
    r->code = 0;
    r->octets = 0;
    r->text[0] = '\0';
    for (int lines = 0; lines < REPLY_LINES; lines++) {
        const char *keyword;
        int code;
        if (!read_line(s))
            return false;
        r->octets += s->io.line_octets;
        keyword = ehlo && s->line_len > 4 ? keyword_clause(s->line + 4) : NULL;
        if (!s->io.line_cut)
            trace_line(s, other_side(s->self), keyword ? keyword : clause, "%s", s->line);
        if (s->io.line_cut || s->line_len > REPLY_LINE || !reply_line_valid(s->line, s->line_len))
            break;
        code = atoi((char[]){s->line[0], s->line[1], s->line[2], '\0'});
        if (r->code && code != r->code)
            break;
        r->code = code;
        if (lines == 0 || !ehlo || keyword)
            used += (size_t)snprintf(r->text + used, sizeof r->text - used, "%s%s", lines ? "\n" : "",
                                     s->line_len > 4 ? s->line + 4 : "");
        if (used >= sizeof r->text && ehlo)
            break;
        used = used < sizeof r->text ? used : sizeof r->text - 1;
        if (s->line[3] != '-')
            return true;
        if (lines == 0)
            stream_bound(&s->io, REPLY_TIMEOUT);
    }
    s->protocol_broken = true;
    stream_break(&s->io, "the peer sent something that is not an SMTP reply");
    return false;
}

/* If the reply is not complete, all later input is ignored, because it could be the rest of this reply. */
static bool read_whole_reply(struct session *s, const char *clause, struct reply *r, bool ehlo)
{
    int64_t deadline = s->io.deadline;
    bool complete = read_reply_lines(s, clause, r, ehlo);
    s->io.deadline = deadline;
    if (!complete)
        stream_end_input(&s->io);
    return complete;
}

/* Sends what is buffered before a reply is read. A peer may have sent a reply without waiting for the command. That
 * reply must not count while the command or the message is unsent. False: it cannot be sent. */
static bool command_has_left(struct session *s, struct reply *r)
{
    r->code = 0;
    return !s->io.broken && (s->io.out_end == 0 || stream_flush(&s->io));
}

bool read_reply(struct session *s, const char *clause, struct reply *r)
{
    return command_has_left(s, r) && read_whole_reply(s, clause, r, false);
}

bool read_ehlo_reply(struct session *s, const char *clause, struct reply *r)
{
    return command_has_left(s, r) && read_whole_reply(s, clause, r, true);
}

bool read_arrived_reply(struct session *s, const char *clause, struct reply *r)
{
    return read_whole_reply(s, clause, r, false);
}

bool reply_arrived(struct session *s)
{
    const char *line;
    size_t len, offset = 0;
    while ((len = stream_line_at(&s->io, offset, &line)) > 0) {
        if (len < 4 || line[3] != '-')
            return true;
        offset += len;
    }
    return offset == sizeof s->io.in;
}

void join_lines(const struct reply *r, char *out, size_t size)
{
    char text[2 * sizeof r->text];
    size_t n = 0;
    for (const char *p = r->text; *p; p++) {
        if (*p == '\n')
            memcpy(text + n, " / ", 3);
        else
            text[n] = *p;
        n += *p == '\n' ? 3 : 1;
        if (n + 4 > sizeof text)
            break;
    }
    text[n] = '\0';
    escape(out, size, text);
}

enum verdict reply_verdict(const struct reply *r)
{
    if (r->code == 0) /* not a reply: our own refusal, in the same form */
        return REFUSED;
    return r->code < 300 ? DELIVERED : r->code < 500 ? DEFERRED : REFUSED;
}

const char *next_word(const char **list, size_t *len)
{
    const char *word;
    while (**list == ' ' || **list == '\t')
        (*list)++;
    word = *list;
    *len = strcspn(word, " \t\n");
    *list += *len;
    return *len ? word : NULL;
}

bool list_has(const char *list, const char *wanted)
{
    size_t len;
    const char *word;
    while (list && (word = next_word(&list, &len)))
        if (len == strlen(wanted) && strncasecmp(word, wanted, len) == 0)
            return true;
    return false;
}

/* Finds the first line after `line` that starts with the keyword. Returns the text after the keyword, or NULL. */
static const char *next_keyword(const char *line, const char *keyword)
{
    size_t n = strlen(keyword);
    while (line && (line = strchr(line, '\n'))) {
        line++;
        if (strncasecmp(line, keyword, n) == 0 && strchr(" =\n", line[n]))
            return line + n + (line[n] == ' ' || line[n] == '='); /* strchr finds '\0' too */
    }
    return NULL;
}

const char *reply_keyword(const struct reply *r, const char *keyword)
{
    return next_keyword(r->text, keyword); /* the first line is the greeting, not a keyword */
}

bool reply_parameters(const struct reply *r, const char *keyword, char *out, size_t size)
{
    size_t used = 0;
    *out = '\0';
    for (const char *at = next_keyword(r->text, keyword); at && used < size; at = next_keyword(at, keyword))
        used += (size_t)snprintf(out + used, size - used, "%s%.*s", used ? " " : "", (int)strcspn(at, "\n"), at);
    return reply_keyword(r, keyword) != NULL;
}

bool reply_offers(const struct reply *r, const char *keyword, const char *word)
{
    const char *list = next_keyword(r->text, keyword);
    while (list && !list_has(list, word))
        list = next_keyword(list, keyword);
    return list != NULL;
}

/* ==== 11. Addresses and domains ======================================================================
 *
 * What ATRN, an envelope and a path may name. A domain that has passed domain_valid() has no slash, no dot at either
 * end and no empty label, so it is safe as the name of a directory. */

#define LABEL_MAX 63             /* RFC 1035, 2.3.4 */

bool domain_valid(const char *domain, size_t len)
{
    size_t label = 0, labels = 1;
    if (len > DOMAIN_MAX)
        return false;
    for (size_t i = 0; i <= len; i++) {
        char c = i < len ? domain[i] : '.';
        if (c == '.') {
            if (label == 0 || label > LABEL_MAX || domain[i - 1] == '-')
                return false;
            labels += i < len;
            label = 0;
        } else if (isascii((unsigned char)c) && (isalnum((unsigned char)c) || (c == '-' && label > 0))) {
            label++;
        } else {
            return false;
        }
    }
    return labels >= 2;
}

bool printable(const char *text, size_t len)
{
    for (size_t i = 0; i < len; i++)
        if ((unsigned char)text[i] < 0x20 || (unsigned char)text[i] > 0x7e)
            return false;
    return true;
}

bool ascii(const char *text)
{
    while (isascii((unsigned char)*text) && *text)
        text++;
    return *text == '\0';
}

void lower_case(char *text)
{
    for (; *text; text++)
        *text = (char)tolower((unsigned char)*text);
}

/* Returns the domain of a mailbox, which begins after the last @ outside quotes. */
const char *mailbox_domain(const char *mailbox)
{
    const char *at = NULL;
    bool quoted = false;
    for (const char *p = mailbox; *p; p++) {
        if (*p == '\\' && quoted && p[1])
            p++;
        else if (*p == '"')
            quoted = !quoted;
        else if (*p == '@' && !quoted)
            at = p + 1;
    }
    return at;
}

size_t utf8_prefix(const char *text, size_t len)
{
    size_t at = 0;
    while (at < len) {
        unsigned long character;
        int n = UTF8_getc((const unsigned char *)text + at, len - at > 4 ? 4 : (int)(len - at), &character);
        if (n <= 0)
            break;
        at += (size_t)n;
    }
    return at;
}

/* Returns the length of the local part (RFC 5321, 4.1.2), which is a quoted string, or atoms and dots. Dots are allowed
 * anywhere, because real senders write two dots in a row. Returns 0 if it is neither. */
static size_t local_part(const char *text)
{
    size_t n = 0;
    if (*text != '"') {
        while (isalnum((unsigned char)text[n]) || !isascii((unsigned char)text[n]) ||
               (text[n] && strchr("!#$%&'*+-/=?^_`{|}~.", text[n])))
            n++;
        return n;
    }
    for (n = 1; text[n] != '"'; n++) {
        n += text[n] == '\\';
        if ((unsigned char)text[n] < 0x20 || text[n] == 0x7f)
            return 0;
    }
    return n + 1;
}

/* [192.0.2.1] or [IPv6:2001:db8::1] (RFC 5321, 4.1.3). */
static bool address_literal_valid(const char *text)
{
    unsigned char octets[16];
    char address[64];
    size_t len = strlen(text);
    if (len < 3 || len - 2 >= sizeof address || text[0] != '[' || text[len - 1] != ']')
        return false;
    snprintf(address, sizeof address, "%.*s", (int)len - 2, text + 1);
    return inet_pton(AF_INET, address, octets) == 1 ||
           (strncasecmp(address, "IPv6:", 5) == 0 && inet_pton(AF_INET6, address + 5, octets) == 1);
}

/* Checks the part after the @. A sender's domain may have more forms, because it is only passed on. */
static bool mailbox_domain_valid(const char *domain, bool sender)
{
    char before = '.';
    if (sender && address_literal_valid(domain))
        return true;
    for (const char *p = domain; *p; before = *p++) {
        bool letter = isalnum((unsigned char)*p) || *p == '-' || (sender && (*p == '_' || !isascii((unsigned char)*p)));
        if (*p == '.' ? before == '.' : !letter)
            return false;
    }
    return before != '.' && strlen(domain) <= DOMAIN_MAX;
}

static bool mailbox_valid(const char *mailbox, bool sender)
{
    size_t len = strlen(mailbox), local = local_part(mailbox);
    return local > 0 && len <= MAILBOX_MAX && mailbox[local] == '@' && utf8_prefix(mailbox, len) == len &&
           mailbox_domain_valid(mailbox + local + 1, sender);
}

bool recipient_valid(const char *mailbox)
{
    return mailbox_valid(mailbox, false);
}

bool sender_valid(const char *mailbox)
{
    return *mailbox == '\0' || mailbox_valid(mailbox, true);
}

void write_date(FILE *out, const char *before, time_t when)
{
    char date[64];
    struct tm tm = local_time(when);
    strftime(date, sizeof date, "%a, %d %b %Y %H:%M:%S %z", &tm);
    fprintf(out, "%s%s\n", before, date);
}

/* ==== 12. The stream =================================================================================
 *
 * A stream is one connected socket with buffers, in the clear or through TLS. For every other part a stream blocks:
 * reading waits for the peer, and writing waits for room. Three things are done only here:
 *
 *   - Waiting. Reading and writing wait for the peer only in socket_wait(), which knows the time-out, the deadline
 *     and the pipe that reports a shutdown.
 *   - OpenSSL's I/O. Through a BIO of our own, TLS uses the same two functions of the socket as plain text does. A
 *     thread therefore waits for half a TLS record as it does for half a line. Only application data counts as input.
 *     TLS records without any are read, but they do not make the stream ready.
 *   - The reason why a connection has failed. The first reason is kept in `broken`, as text. From then on nothing is
 *     sent and no call waits, so a caller may check once, at the end of its work. What has arrived can still be read.
 *
 * All output is flushed before any wait for input, so two peers never wait for each other. */

#define ENDLESS_LINE (64 << 20)  /* octets without a line end; then the connection is broken */
#define EMPTY_RECORDS 16         /* TLS records without application data that are read one after the other */
#define LINGER_READS 64          /* reads of input that is discarded before TLS */
#define LINGER_MS 1000           /* when closing, the longest time for which input is still read and discarded */
#define PATIENCE_OCTETS 16384    /* when the peer has taken so many octets, its time-out restarts */
#define TLS_OUT (STREAM_OUT + 4096) /* room for STREAM_OUT as TLS records of 16 kB each */

static const char closed_by_peer[] = "the peer closed the connection";

int64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

void stream_init(struct stream *s, int fd, int timeout)
{
    memset(s, 0, offsetof(struct stream, in)); /* not the buffers: untouched pages take no memory */
    s->fd = fd;
    s->wake_fd = -1;
    s->timeout = timeout;
}

void stream_break(struct stream *s, const char *why)
{
    if (!s->broken)
        s->broken = why;
}

/* Starts the time-out of the operation that begins now; the deadline may shorten it. */
static void set_patience(struct stream *s)
{
    s->sent = 0;
    s->until = now_ms() + (int64_t)s->timeout * 1000;
    if (s->deadline && s->deadline < s->until)
        s->until = s->deadline;
}

void stream_bound(struct stream *s, int seconds)
{
    int64_t end = now_ms() + (int64_t)seconds * 1000;
    end = s->until < end ? s->until : end;
    s->deadline = s->deadline && s->deadline < end ? s->deadline : end;
}

static bool out_of_time(struct stream *s)
{
    if (now_ms() < s->until)
        return false;
    s->timed_out = true;
    stream_break(s, "the peer kept us waiting too long");
    return true;
}

/* The number of octets that were sent and that the peer's TCP has not taken yet. Linux buffers up to 4 MB of them. */
static int octets_on_the_way(const struct stream *s)
{
    int octets;
    return ioctl(s->fd, SIOCOUTQ, &octets) < 0 ? 0 : octets;
}

/* A peer that reads slowly makes progress, although nothing can be written and no reply is due yet. If its TCP takes
 * PATIENCE_OCTETS within the time-out, the time-out restarts. */
static bool socket_wait(struct stream *s, short events)
{
    struct pollfd p[2] = {{.fd = s->fd, .events = events}, {.fd = s->wake_fd, .events = POLLIN}};
    nfds_t n = s->wake_fd >= 0 ? 2 : 1;
    int before = octets_on_the_way(s);
    if (events == POLLIN) {
        s->waits += s->spoke;
        s->spoke = false;
    }
    for (;;) {
        int64_t left;
        int ready;
        if (now_ms() >= s->until && before - octets_on_the_way(s) >= PATIENCE_OCTETS) {
            before = octets_on_the_way(s);
            set_patience(s);
        }
        if (out_of_time(s))
            return false;
        left = s->until - now_ms();
        ready = poll(p, n, left < 0 ? 0 : left > INT_MAX ? INT_MAX : (int)left);
        if (ready > 0 && n == 2 && p[1].revents) {
            s->woken = true;
            stream_break(s, "this server is shutting down");
            return false;
        }
        if (ready > 0)
            return true;
        if (ready < 0 && errno != EINTR) {
            stream_break(s, "poll failed");
            return false;
        }
    }
}

/* The two functions that read and write the socket. The descriptor blocks, but with MSG_DONTWAIT the kernel gives what
 * it has, or takes what it has room for, and returns at once. Only socket_wait() waits. */

/* Reads what has arrived; never waits. -1: nothing has arrived (s->dry), or nothing more will arrive (s->ended). */
static ssize_t socket_read(struct stream *s, void *data, size_t size)
{
    ssize_t n;
    do
        n = recv(s->fd, data, size, MSG_DONTWAIT);
    while (n < 0 && errno == EINTR);
    s->dry = n < 0 && errno == EAGAIN;
    if (n <= 0 && !s->dry)
        s->ended = n == 0 ? closed_by_peer : "the connection was lost";
    return n > 0 ? n : -1;
}

static ssize_t socket_write(struct stream *s, const void *data, size_t size)
{
    ssize_t n = -1;
    while (!s->broken && (n = send(s->fd, data, size, MSG_NOSIGNAL | MSG_DONTWAIT)) < 0 &&
           (errno == EAGAIN || errno == EINTR))
        socket_wait(s, POLLOUT);
    if (n < 0)
        stream_break(s, "the connection was lost");
    else if ((s->sent += (size_t)n) >= PATIENCE_OCTETS) /* the peer reads */
        set_patience(s);
    return n;
}

/* ---- TLS over the same two functions ---- */

static int tls_bio_read(BIO *bio, char *data, int size)
{
    struct stream *s = BIO_get_data(bio);
    ssize_t n = socket_read(s, data, (size_t)size);
    BIO_clear_retry_flags(bio);
    if (s->dry)
        BIO_set_retry_read(bio);
    return (int)n;
}

/* A failure is not reported to OpenSSL, so what has arrived can still be read. s->broken stops all further writing. */
static int tls_bio_write(BIO *bio, const char *data, int size)
{
    ssize_t n = socket_write(BIO_get_data(bio), data, (size_t)size);
    return n < 0 ? size : (int)n;
}

static long tls_bio_control(BIO *bio, int command, long number, void *pointer)
{
    (void)bio, (void)number, (void)pointer;
    return command == BIO_CTRL_FLUSH; /* nothing is kept back, so there is nothing to flush */
}

/* Made with the first of our contexts. If the first session made it under pthread_once(), a single failure for lack of
 * memory would disable TLS for good. */
static BIO_METHOD *tls_bio_method;

static bool make_tls_bio_method(void)
{
    if (tls_bio_method)
        return true;
    tls_bio_method = BIO_meth_new(BIO_TYPE_SOURCE_SINK | BIO_get_new_index(), "odmr stream");
    if (!tls_bio_method)
        return false;
    BIO_meth_set_read(tls_bio_method, tls_bio_read);
    BIO_meth_set_write(tls_bio_method, tls_bio_write);
    BIO_meth_set_ctrl(tls_bio_method, tls_bio_control);
    return true;
}

/* Output passes through a buffer of OpenSSL, so that all the records of one flush are sent together. */
static bool set_tls_bios(SSL *tls, struct stream *s)
{
    BIO *bio = BIO_new(tls_bio_method), *gathered = BIO_new(BIO_f_buffer());
    if (!bio || !gathered || BIO_set_write_buffer_size(gathered, TLS_OUT) != 1 || BIO_up_ref(bio) != 1) {
        BIO_free(gathered);
        BIO_free(bio);
        return false;
    }
    BIO_set_data(bio, s);
    BIO_set_init(bio, 1);
    SSL_set0_rbio(tls, bio);
    SSL_set0_wbio(tls, BIO_push(gathered, bio));
    return true;
}

/* Sets the name or address that the certificate must be for. */
static bool expect_name(SSL *tls, const char *host)
{
    unsigned char address[16];
    if (inet_pton(AF_INET, host, address) == 1 || inet_pton(AF_INET6, host, address) == 1)
        return X509_VERIFY_PARAM_set1_ip_asc(SSL_get0_param(tls), host) == 1;
    return X509_VERIFY_PARAM_set1_host(SSL_get0_param(tls), host, 0) == 1 && SSL_set_tlsext_host_name(tls, host) == 1;
}

SSL *stream_offer_tls(struct stream *s, SSL_CTX *context, const char *host)
{
    SSL *tls = SSL_new(context);
    if (tls && (!host || expect_name(tls, host)) && set_tls_bios(tls, s))
        return tls;
    SSL_free(tls);
    return NULL;
}

/* Finds out why SSL_read() or a handshake did not succeed. True: more input from the peer is needed. */
static bool tls_wants_more(struct stream *s, int returned)
{
    int error = SSL_get_error(s->tls, returned);
    if (error == SSL_ERROR_WANT_READ)
        return true;
    if (error == SSL_ERROR_ZERO_RETURN)
        s->ended = closed_by_peer;
    s->tls_failed |= !s->ended && !s->broken;
    return false;
}

/* Reads the application data of the next record; never waits. -1: there is none (yet). Some records carry none, for
 * example a key update or a session ticket. A peer that sends nothing else must not keep the thread here. */
static ssize_t encrypted_read(struct stream *s, void *data, size_t size)
{
    int64_t until = s->until; /* the answer to a key update must not restart the time-out */
    int n, records = 0;
    do {
        ERR_clear_error();
        n = SSL_read(s->tls, data, (int)size);
        if (n <= 0 && !tls_wants_more(s, n) && !s->ended)
            stream_break(s, "TLS failed");
    } while (n <= 0 && !s->dry && !s->ended && !s->broken && ++records < EMPTY_RECORDS);
    s->until = until;
    return n > 0 ? n : -1;
}

static ssize_t encrypted_write(struct stream *s, const void *data, size_t size)
{
    const char *newline = s->line_records ? memchr(data, '\n', size) : NULL;
    int n;
    if (newline)
        size = (size_t)(newline + 1 - (const char *)data);
    ERR_clear_error();
    n = SSL_write(s->tls, data, (int)size);
    if (n <= 0) {
        s->tls_failed |= !s->broken;
        stream_break(s, "TLS failed");
    }
    return n;
}

bool stream_flush(struct stream *s)
{
    size_t at = 0;
    set_patience(s);
    while (at < s->out_end && !s->broken) {
        ssize_t n = s->tls ? encrypted_write(s, s->out + at, s->out_end - at)
                           : socket_write(s, s->out + at, s->out_end - at);
        if (n > 0)
            at += (size_t)n;
    }
    if (s->tls)
        (void)BIO_flush(SSL_get_wbio(s->tls)); /* if that fails, socket_write() has set s->broken */
    s->gone += !s->tls || !s->broken ? at : 0;
    s->spoke = true;
    s->out_end = 0;
    return !s->broken;
}

bool stream_start_tls(struct stream *s, SSL *tls, const char *host)
{
    int n;
    stream_flush(s);
    s->tls = tls;
    s->in_at = s->in_end = 0;
    set_patience(s);
    do {
        ERR_clear_error();
        n = host ? SSL_connect(tls) : SSL_accept(tls);
    } while (n <= 0 && tls_wants_more(s, n) && socket_wait(s, POLLIN));
    if (s->ended)
        stream_break(s, s->ended);
    if (n <= 0)
        stream_break(s, SSL_get_verify_result(tls) == X509_V_OK
                            ? "the TLS handshake failed"
                            : X509_verify_cert_error_string(SSL_get_verify_result(tls)));
    return !s->broken;
}

/* ---- Buffered octets ---- */

void stream_write(struct stream *s, const char *data, size_t len)
{
    while (len > 0 && !s->broken) {
        size_t room = sizeof s->out - s->out_end;
        size_t part = len < room ? len : room;
        memcpy(s->out + s->out_end, data, part);
        s->out_end += part;
        data += part;
        len -= part;
        if (s->out_end == sizeof s->out)
            stream_flush(s);
    }
}

char *stream_space(struct stream *s, size_t len)
{
    if (sizeof s->out - s->out_end < len)
        stream_flush(s);
    return s->out + s->out_end;
}

void stream_add(struct stream *s, size_t len)
{
    s->out_end += len;
}

/* Appends the octets that have arrived to the buffer; never waits. False: none has arrived, or there is no room. */
static bool stream_take_in(struct stream *s)
{
    ssize_t n = -1;
    memmove(s->in, s->in + s->in_at, s->in_end - s->in_at);
    s->in_end -= s->in_at;
    s->in_at = 0;
    if (!s->ended && s->in_end < sizeof s->in)
        n = s->tls ? encrypted_read(s, s->in + s->in_end, sizeof s->in - s->in_end)
                   : socket_read(s, s->in + s->in_end, sizeof s->in - s->in_end);
    s->in_end += n > 0 ? (size_t)n : 0;
    return n > 0;
}

bool stream_ready(struct stream *s)
{
    return s->in_at < s->in_end || stream_take_in(s) || s->ended;
}

bool stream_closed_by_peer(const struct stream *s)
{
    return s->ended == closed_by_peer;
}

bool stream_over(const struct stream *s)
{
    return s->in_at == s->in_end && (s->ended || s->broken);
}

size_t stream_line_at(struct stream *s, size_t offset, const char **line)
{
    const char *newline;
    while (!(newline = memchr(s->in + s->in_at + offset, '\n', s->in_end - s->in_at - offset)))
        if (!stream_take_in(s))
            break;
    *line = s->in + s->in_at + offset;
    if (newline)
        return (size_t)(newline + 1 - *line);
    return s->in_end - s->in_at == sizeof s->in ? sizeof s->in - offset : 0;
}

bool stream_has_line(struct stream *s)
{
    const char *line;
    return stream_line_at(s, 0, &line) > 0;
}

/* RFC 3207, 4.2: what was sent in the clear cannot be trusted. Input received after STARTTLS is therefore discarded,
 * from the buffer and from the socket, and commands in it are never executed. */
bool stream_discard_input(struct stream *s)
{
    bool some = false;
    for (int i = 0; i < LINGER_READS && (s->in_at < s->in_end || stream_take_in(s)); i++) {
        some = true;
        s->in_at = s->in_end = 0;
    }
    return some;
}

/* Ends the input of a broken stream: octets that are buffered or still arrive are not read. */
void stream_end_input(struct stream *s)
{
    s->in_at = s->in_end = 0;
    if (!s->ended)
        s->ended = s->broken;
}

/* Called with the input buffer empty. Flushes all output, then waits for input. */
static bool stream_fill(struct stream *s)
{
    int64_t until = s->until;
    if (s->out_end > 0 && !stream_flush(s))
        return false;
    s->until = until;
    if (s->broken || out_of_time(s)) /* a peer that never pauses is never waited for, so its time is checked here */
        return false;
    while (!stream_take_in(s)) {
        if (s->ended)
            stream_break(s, s->ended);
        if (s->broken || !socket_wait(s, POLLIN))
            return false;
    }
    return true;
}

bool stream_peek(struct stream *s, const char **data, size_t *len)
{
    if (s->in_at == s->in_end) {
        set_patience(s);
        if (!stream_fill(s))
            return false;
    }
    *data = s->in + s->in_at;
    *len = s->in_end - s->in_at;
    return true;
}

void stream_skip(struct stream *s, size_t len)
{
    s->in_at += len;
}

/* The time-out is for the whole line: a peer that sends an octet a minute does not extend it. The content of a message
 * is read by stream_peek(), where each octet restarts the time-out, because a network may be slow. */
bool stream_read_line(struct stream *s, char *line, size_t size, size_t *len)
{
    size_t total = 0, kept = 0;
    set_patience(s);
    for (;;) {
        const char *from, *newline;
        size_t part, room = size - 1 - kept;
        if (s->in_at == s->in_end && !stream_fill(s))
            return false;
        from = s->in + s->in_at;
        newline = memchr(from, '\n', s->in_end - s->in_at);
        part = newline ? (size_t)(newline + 1 - from) : s->in_end - s->in_at;
        memcpy(line + kept, from, part < room ? part : room);
        kept += part < room ? part : room;
        total += part;
        s->in_at += part;
        if (newline)
            break;
        if (total > ENDLESS_LINE) {
            stream_break(s, "the peer sent a line without an end");
            return false;
        }
    }
    s->line_octets = total;
    s->line_cut = total > kept;
    kept -= kept >= 2 && line[kept - 2] == '\r' ? 2 : 1;
    line[kept] = '\0';
    *len = kept;
    return true;
}

void stream_end(struct stream *s)
{
    if (!s->broken)
        stream_flush(s);
    if (s->tls && !s->broken)
        SSL_shutdown(s->tls);
    shutdown(s->fd, SHUT_WR);
}

/* If input is unread at close(), the kernel sends a reset, which can overtake our last reply, for example a 421. So the
 * end of our output is sent first, and then all input is discarded for at most LINGER_MS. There is no wait after QUIT,
 * because the peer sends nothing more, and none when this server is shutting down. */
void stream_close(struct stream *s)
{
    int64_t until = now_ms() + LINGER_MS;
    stream_end(s);
    SSL_free(s->tls);
    s->tls = NULL;
    for (int64_t left; !s->said_quit && !s->woken && (left = until - now_ms()) > 0;) {
        struct pollfd p = {.fd = s->fd, .events = POLLIN};
        if (poll(&p, 1, (int)left) <= 0 || recv(s->fd, s->in, sizeof s->in, MSG_DONTWAIT) <= 0)
            break;
    }
    close(s->fd);
    s->fd = -1;
    stream_break(s, "closed");
}

/* ==== 12. TLS, and connecting ========================================================================
 *
 * The certificates and keys that this program uses, and the authorities that it trusts. The stream does the handshake.
 * TLS 1.2 is the oldest version allowed. No TLS sessions are kept, because connections do not depend on each other. */

/* Says why OpenSSL rejects the file of an option, because its own text ("system lib") does not. wanted: what the file
 * must contain. path is NULL if no file is concerned. */
static void explain_tls(char *why, size_t size, const char *option, const char *path, const char *wanted)
{
    const char *reason = ERR_reason_error_string(ERR_peek_last_error());
    bool pem = false, found = false, locked = false;
    char line[256];
    FILE *file = path ? fopen(path, "re") : NULL;
    while (file && fgets(line, sizeof line, file)) {
        pem |= strncmp(line, "-----BEGIN ", 11) == 0;
        found |= strncmp(line, "-----BEGIN ", 11) == 0 && strstr(line, wanted);
        locked |= strstr(line, "ENCRYPTED") != NULL;
    }
    if (path && (!file || ferror(file)))
        reason = errno == ENOENT ? "no such file" : strerror(errno);
    else if (path && !pem)
        reason = "not PEM";
    else if (path && !found)
        reason = strcmp(wanted, "CERTIFICATE") == 0 ? "no certificate in it" : "no private key in it";
    else if (locked)
        reason = "the private key is encrypted";
    else if (!reason || strstr(reason, " lib"))
        reason = "OpenSSL cannot use it";
    snprintf(why, size, "%s%s%s: %s", option, path ? " " : "", path ? path : "", reason);
    if (file)
        fclose(file);
    ERR_clear_error();
}

/* An encrypted key cannot be used, because there is no user who could enter its pass phrase. */
static int no_pass_phrase(char *buffer, int size, int writing, void *context)
{
    (void)buffer, (void)size, (void)writing, (void)context;
    return -1;
}

/* SSLKEYLOGFILE works as in browsers and curl: the secrets of each TLS session are written to that file, and Wireshark
 * can then decrypt the session. Use it for experiments only, because a reader of the file can read the mail. */
static int key_log = -1;

static void log_key(const SSL *tls, const char *secret)
{
    char line[1024];
    int n = snprintf(line, sizeof line, "%s\n", secret);
    (void)tls;
    if (n < (int)sizeof line && write(key_log, line, (size_t)n) < 0)
        log_event(NULL, LOG_WARNING, "SSLKEYLOGFILE: %s; a secret of this TLS session is not in it", strerror(errno));
}

static void open_key_log(void)
{
    const char *path = secure_getenv("SSLKEYLOGFILE");
    if (!path || !*path)
        return;
    key_log = open(path, O_WRONLY | O_APPEND | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (key_log >= 0)
        log_event(NULL, LOG_WARNING, "SSLKEYLOGFILE %s: who reads it can read what TLS protects", path);
    else
        log_event(NULL, LOG_WARNING, "SSLKEYLOGFILE %s: %s; no secrets are written", path, strerror(errno));
}

static SSL_CTX *tls_context(const SSL_METHOD *method, const char *cert, const char *key, char *why, size_t size)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    SSL_CTX *context = SSL_CTX_new(method);
    pthread_once(&once, open_key_log);
    if (context)
        SSL_CTX_set_default_passwd_cb(context, no_pass_phrase);
    ERR_clear_error();
    if (!make_tls_bio_method() || !context || SSL_CTX_set_min_proto_version(context, TLS1_2_VERSION) != 1) {
        explain_tls(why, size, "TLS", NULL, "");
    } else if (cert && SSL_CTX_use_certificate_chain_file(context, cert) != 1) {
        explain_tls(why, size, "--cert", cert, "CERTIFICATE");
    } else if (cert && (SSL_CTX_use_PrivateKey_file(context, key, SSL_FILETYPE_PEM) != 1 ||
                        SSL_CTX_check_private_key(context) != 1)) {
        explain_tls(why, size, key == cert ? "--cert" : "--key", key, "PRIVATE KEY");
    } else {
        SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
        SSL_CTX_set_options(context, SSL_OP_NO_TICKET | SSL_OP_NO_RENEGOTIATION);
        SSL_CTX_set_mode(context, SSL_MODE_RELEASE_BUFFERS);
        if (key_log >= 0)
            SSL_CTX_set_keylog_callback(context, log_key);
        SSL_CTX_clear_mode(context, SSL_MODE_AUTO_RETRY); /* encrypted_read() counts empty records */
        return context;
    }
    SSL_CTX_free(context);
    return NULL;
}

/* The provider requests a client certificate. If it does not verify, the customer may still log in without it.
 * Verification failures are checked later, in certificate_verified(). */
static int let_pass(int verified, X509_STORE_CTX *store)
{
    (void)verified, (void)store;
    return 1;
}

SSL_CTX *tls_server_context(const char *cert, const char *key, const char *client_ca, char *why, size_t size)
{
    SSL_CTX *context = tls_context(TLS_server_method(), cert, key, why, size);
    STACK_OF(X509_NAME) *names;
    if (!context)
        return NULL;
    SSL_CTX_set_num_tickets(context, 0);
    if (!client_ca)
        return context;
    names = SSL_load_client_CA_file(client_ca);
    if (!names || SSL_CTX_load_verify_locations(context, client_ca, NULL) != 1) {
        explain_tls(why, size, "--client-ca", client_ca, "CERTIFICATE");
        sk_X509_NAME_pop_free(names, X509_NAME_free);
        SSL_CTX_free(context);
        return NULL;
    }
    SSL_CTX_set_client_CA_list(context, names);
    SSL_CTX_set_verify(context, SSL_VERIFY_PEER, let_pass);
    return context;
}

SSL_CTX *tls_client_context(const char *ca, bool insecure, const char *cert, const char *key, char *why, size_t size)
{
    SSL_CTX *context = tls_context(TLS_client_method(), cert, key, why, size);
    if (!context)
        return NULL;
    if (ca ? SSL_CTX_load_verify_locations(context, ca, NULL) != 1 : SSL_CTX_set_default_verify_paths(context) != 1) {
        explain_tls(why, size, ca ? "--ca" : "the system's certificates", ca, "CERTIFICATE");
        SSL_CTX_free(context);
        return NULL;
    }
    SSL_CTX_set_verify(context, insecure ? SSL_VERIFY_NONE : SSL_VERIFY_PEER, NULL);
    return context;
}

bool certificate_verified(SSL *tls)
{
    X509 *certificate = tls ? SSL_get1_peer_certificate(tls) : NULL;
    bool verified = certificate && SSL_get_verify_result(tls) == X509_V_OK;
    X509_free(certificate);
    return verified;
}

/* A certificate names its owner by each DNS name and e-mail address of subjectAltName or, if there is none, by the
 * subject's CN. Returns the index-th name, allocated by OpenSSL, or NULL if there are no more. */
char *certificate_name(X509 *certificate, int index)
{
    GENERAL_NAMES *alternatives = X509_get_ext_d2i(certificate, NID_subject_alt_name, NULL, NULL);
    const X509_NAME *subject = X509_get_subject_name(certificate);
    const ASN1_STRING *text = NULL;
    unsigned char *name = NULL;
    int found = 0, at;
    for (int i = 0; i < sk_GENERAL_NAME_num(alternatives); i++) {
        const GENERAL_NAME *g = sk_GENERAL_NAME_value(alternatives, i);
        if ((g->type == GEN_DNS || g->type == GEN_EMAIL) && found++ == index)
            text = g->d.ia5;
    }
    if (found == 0 && index == 0 && (at = X509_NAME_get_index_by_NID(subject, NID_commonName, -1)) >= 0)
        text = X509_NAME_ENTRY_get_data(X509_NAME_get_entry(subject, at));
    if (text && ASN1_STRING_to_UTF8(&name, text) != (int)strlen((char *)(name ? name : (unsigned char *)"")) && name) {
        OPENSSL_free(name); /* a NUL octet in it: as a string it would be another name */
        name = NULL;
    }
    GENERAL_NAMES_free(alternatives);
    return (char *)name;
}

/* RFC 5929, 4.1: the server's certificate, hashed as for its signature, but with SHA-256 instead of MD5 or SHA-1. */
static size_t bind_to_certificate(SSL *tls, bool server, unsigned char *out)
{
    X509 *certificate = server ? SSL_get_certificate(tls) : SSL_get1_peer_certificate(tls);
    const EVP_MD *hash = EVP_sha256();
    unsigned int len = 0;
    int nid;
    if (!certificate)
        return 0;
    if (X509_get_signature_info(certificate, &nid, NULL, NULL, NULL) == 1 && nid != NID_md5 && nid != NID_sha1 &&
        EVP_get_digestbynid(nid))
        hash = EVP_get_digestbynid(nid);
    if (X509_digest(certificate, hash, out, &len) != 1)
        len = 0;
    if (!server)
        X509_free(certificate);
    return len;
}

/* RFC 9266: 32 octets that only the two ends of this connection can know. */
static size_t bind_to_exporter(SSL *tls, unsigned char *out)
{
    static const char label[] = "EXPORTER-Channel-Binding";
    return SSL_version(tls) >= TLS1_3_VERSION &&
                   SSL_export_keying_material(tls, out, 32, label, sizeof label - 1, NULL, 0, 1) == 1
               ? 32
               : 0;
}

size_t channel_binding(SSL *tls, bool server, const char *type, unsigned char out[EVP_MAX_MD_SIZE])
{
    if (tls && strcmp(type, "tls-exporter") == 0)
        return bind_to_exporter(tls, out);
    if (tls && strcmp(type, "tls-server-end-point") == 0)
        return bind_to_certificate(tls, server, out);
    return 0;
}

/* ---- Connect ---- */

bool split_host_port(const char *text, const char *default_port, char *host, size_t host_size, char *port,
                     size_t port_size)
{
    bool bracket = *text == '[', bare_ipv6 = strchr(text, ':') != strrchr(text, ':');
    const char *start = text + bracket;
    size_t len = strcspn(start, bracket ? "]" : bare_ipv6 ? "" : ":");
    const char *rest = start + len, *wanted;
    if (bracket && *rest++ != ']')
        return false;

    wanted = *rest == ':' ? rest + 1 : default_port;
    if ((*rest != ':' && *rest != '\0') || len >= host_size || !wanted || !*wanted || strlen(wanted) >= port_size)
        return false;
    if (isdigit((unsigned char)*wanted) && strtoul(wanted, NULL, 10) > UINT16_MAX)
        return false; /* getaddrinfo() would take it modulo 65536 */
    memcpy(host, start, len);
    host[len] = '\0';
    snprintf(port, port_size, "%s", wanted);
    return true;
}

/* For `return`: logs why there is no socket, and returns -1. */
static int not_connected(const char *where, const char *why, int *code, int exit_code)
{
    log_event(NULL, LOG_ERR, "%s: %s", where, why);
    *code = exit_code;
    return -1;
}

int connect_to(const char *where, const char *default_port, int timeout, int *code)
{
    char host[256], port[32];
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *list = NULL;
    struct timeval limit = {.tv_sec = timeout};
    int fd = -1, problem;
    if (!split_host_port(where, default_port, host, sizeof host, port, sizeof port))
        return not_connected(where, "not HOST:PORT", code, EX_USAGE);
    problem = getaddrinfo(host, port, &hints, &list);
    if (problem == EAI_AGAIN || problem == EAI_MEMORY || problem == EAI_SYSTEM)
        return not_connected(where, gai_strerror(problem), code, EX_TEMPFAIL);
    if (problem)
        return not_connected(where, gai_strerror(problem), code, EX_NOHOST);

    for (struct addrinfo *a = list; a && fd < 0; a = a->ai_next) {
        fd = socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC, a->ai_protocol);
        if (fd < 0) {
            problem = problem ? problem : errno; /* the error of connect() for another address says more */
            continue;
        }
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit); /* bounds connect() */
        if (connect(fd, a->ai_addr, a->ai_addrlen) < 0) {
            problem = errno;
            close(fd);
            fd = -1;
        }
    }
    freeaddrinfo(list);
    if (fd < 0)
        return not_connected(where, strerror(problem == EINPROGRESS ? ETIMEDOUT : problem), code,
                             problem == ECONNREFUSED ? EX_UNAVAILABLE : EX_TEMPFAIL);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
    return fd;
}

/* ==== 13. Log and trace ==============================================================================
 *
 * One event is one line and one write to standard error, so that the lines of several threads never mix. A line may
 * contain anything that a peer has sent. Every line of the log and the trace is therefore escaped here as a whole, and
 * no control character from the network reaches a terminal. */

#define PROGRESS_WIDTH 60
#define PROGRESS_MS 200          /* between two lines of progress */
#define LADDER_DECODED 512       /* octets; a longer challenge or response is not decoded */
#define LADDER_LEAST 60          /* columns; on narrower terminals lines wrap */
#define LADDER_MOST 140
#define LADDER_MARGINS 40        /* columns beside the text of an arrow */

void escape(char *out, size_t size, const char *text)
{
    size_t n = 0;
    out[0] = '\0';
    for (; *text && n + 5 < size; text++) {
        unsigned char c = (unsigned char)*text;
        n += (size_t)snprintf(out + n, size - n, c >= 0x20 && c < 0x7f ? "%c" : "\\x%02x", c);
    }
}

void quote(char *out, size_t size, const char *text)
{
    size_t n = 0;
    out[n++] = '"';
    for (; *text && n + 6 < size; text++) {
        if (*text == '"' || *text == '\\')
            out[n++] = '\\';
        out[n++] = *text;
    }
    snprintf(out + n, size - n, "\"%s", *text ? "..." : "");
}

struct tm local_time(time_t when)
{
    struct tm tm;
    if (!localtime_r(&when, &tm))
        tm = (struct tm){.tm_mday = 1, .tm_year = 70, .tm_wday = 4};
    return tm;
}

/* The form of a log line. The customer and the tools write it plain. The provider puts the time (RFC 3339) in front or,
 * for the journal of systemd, the priority (sd-daemon(3)). */
static enum { PLAIN_LINES, TIMED_LINES, JOURNAL_LINES } log_form;

void log_start(void)
{
    const char *journal = getenv("JOURNAL_STREAM"); /* systemd.exec(5): device and inode of the journal's stream */
    char ours[48] = "";
    struct stat st;
    if (fstat(STDERR_FILENO, &st) == 0)
        snprintf(ours, sizeof ours, "%llu:%llu", (unsigned long long)st.st_dev, (unsigned long long)st.st_ino);
    log_form = journal && strcmp(journal, ours) == 0 ? JOURNAL_LINES : TIMED_LINES;
}

/* The customer's line of progress is on the terminal, without a line end; the next line replaces it. */
static atomic_bool progress_shown;

static void clear_progress(void)
{
    if (atomic_exchange(&progress_shown, false))
        fprintf(stderr, "\r%*s\r", PROGRESS_WIDTH, "");
}

__attribute__((format(printf, 3, 0)))
static void print_line(int priority, const char *prefix, const char *fmt, va_list args)
{
    char plain[LOG_LINE], start[64] = "", line[2 * LOG_LINE + 128], zone[8] = "";
    struct tm now = local_time(time(NULL));
    size_t len;
    vsnprintf(plain, sizeof plain, fmt, args);
    if (log_form == TIMED_LINES) {
        size_t n = strftime(start, sizeof start, "%Y-%m-%dT%H:%M:%S", &now);
        strftime(zone, sizeof zone, "%z", &now);
        snprintf(start + n, sizeof start - n, "%.3s:%s ", zone, zone + 3); /* RFC 3339 has +00:00, strftime(3) +0000 */
    } else if (log_form == JOURNAL_LINES) {
        snprintf(start, sizeof start, "<%d>", priority);
    }
    len = (size_t)snprintf(line, sizeof line, "%s%s", start, prefix);
    escape(line + len, sizeof line - len - 1, plain);
    strcat(line + len, "\n");
    clear_progress();
    fputs(line, stderr);
}

void log_event(const struct session *s, int priority, const char *fmt, ...)
{
    char prefix[48] = "odmr: ";
    va_list args;
    if (s && s->muted)
        return;
    if (s)
        snprintf(prefix, sizeof prefix, "odmr: [%lu] ", s->number);
    va_start(args, fmt);
    print_line(priority, prefix, fmt, args);
    va_end(args);
}

void die(int code, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    print_line(LOG_ERR, "odmr: ", fmt, args);
    va_end(args);
    exit(code);
}

void *must_alloc(void *memory)
{
    if (!memory)
        die(EX_OSERR, "out of memory; giving up");
    return memory;
}

const char *plural(uint64_t count)
{
    return count == 1 ? "" : "s";
}

/* ---- The ladder: the same dialogue as a picture ----
 *
 * The customer is on the left, the provider on the right, with an arrow for each line. The margin has the clause that
 * requires the line, and why in a few words. The function that sends or reads a line passes the clause. A line below an
 * arrow shows its decoded base64. With PIPELINING a number joins a reply to its command. */

/* One row for each requirement, or several if its lines differ. reply 0: a command; 2, 4, 5: any reply of that kind. If
 * starts is not NULL, the line must begin with it, a reply after its code. The first row that fits is used. */
static const struct note {
    const char *clause;
    int reply;
    const char *starts, *words;
} notes[2][40] = {{
    /* 5.1 and 5.2: the customer sends the commands */
    {"5.1", 220, NULL, "greets"},
    {"5.1.1-a", 0, "EHLO", "says who it is"},
    {"5.1.1-b", 2, "AUTH", "how to log in"},
    {"5.1.1-b", 2, "ATRN", "this is ODMR"},
    {"5.1.1-a", 2, NULL, "says who it is"},
    {"RFC 3207", 0, "STARTTLS", "asks for TLS"},
    {"RFC 3207", 2, "STARTTLS", "TLS can be had"},
    {"RFC 3207", 2, NULL, "TLS from here on"},
    {"RFC 3207", 4, NULL, "no TLS now"},
    {"RFC 3207", 5, NULL, "no TLS now"},
    {"5.1.2-c", 0, "AUTH CRAM-MD5", "wants to log in"},
    {"5.1.2-f", 0, "AUTH EXTERNAL", "TLS says who I am"},
    {"5.1.2-d", 0, "AUTH", "wants to log in"},
    {"5.1.2-a", 0, "", "response"},
    {"5.1.2-a", 334, NULL, "challenge"},
    {"5.1.2-b", 235, NULL, "logged in: now"},
    {"5.1.2-b", 4, NULL, "not logged in"},
    {"5.1.2-b", 5, NULL, "not logged in"},
    {"5-a", 503, NULL, "not now"},
    {"5.1.3-a", 0, "QUIT", "takes its leave"},
    {"5.1.3-a", 2, NULL, "good-bye"},
    {"5.2.1-a", 0, "ATRN ", "asks for mail"},
    {"5.2.1-d", 0, "ATRN", "for all its mail"},
    {"5.2.1-j", 250, NULL, "mail: roles turn"},
    {"5.2.1-g", 453, NULL, "no mail"},
    {"5.2.1-f", 450, NULL, "not now, or ever"},
    {"5.2.1-k", 451, NULL, "cannot tell now"},
    {"5.2.1-b", 530, NULL, "log in first"},
    {"5.2.1-l", 501, NULL, "that is no list"},
    {"5.4-a", 502, NULL, "not spoken here"},
}, {
    /* 5.3: the provider sends the commands */
    {"5.3-b", 220, NULL, "customer greets"},
    {"5.3-c", 0, "EHLO", "now the client"},
    {"5.3-a", 2, NULL, "now the server"},
    {"RFC 2920", 2, NULL, "send on ahead"},
    {"RFC 3030", 2, NULL, "even further"},
    {"RFC 1870", 2, NULL, "tell me the size"},
    {"RFC 6152", 2, NULL, "octets over 127"},
    {"RFC 6531", 2, NULL, "UTF-8 addresses"},
    {"RFC 2034", 2, NULL, "codes like 5.1.1"},
    {"RFC 9422", 2, NULL, "limits"},
    {"5.3-c", 0, "MAIL", "the reverse-path"},
    {"5.3-c", 0, "RCPT", "a recipient"},
    {"5.3-c", 0, "DATA", "may it come?"},
    {"5.3-c", 354, NULL, "go on"},
    {"5.3-c", 2, NULL, "accepted"},
    {"RFC 3030", 0, "BDAT", "so many octets"},
    {"5.3-c", 0, "...", "the message"},
    {"4-e", 0, ".", "its end"},
    {"4-e", 2, NULL, "now it is theirs"},
    {"4-e", 4, NULL, "stays queued"},
    {"4-e", 5, NULL, "sender is told"},
    {"5-b", 0, "QUIT", "all was sent"},
    {"5-b", 2, NULL, "good-bye"},
}};

/* Any other reply. */
static const struct note other_replies[] = {
    {"", 2, NULL, "accepted"}, {"", 4, NULL, "not now"}, {"", 5, NULL, "refused"}, {0}};

/* The file that the ladder is written to: standard output in the demo. NULL: standard error. */
static FILE *ladder_file;

/* For the demo: draw no line before the reversed state; how often the customer waited before that state. */
static bool ladder_from_reversal;
static unsigned long ladder_waits;

static FILE *ladder_out(void)
{
    return ladder_file ? ladder_file : stderr;
}

/* Returns the escape sequence if the ladder goes to a terminal and NO_COLOR is not set, else "". */
static const char *colour(const char *code)
{
    static atomic_int wanted = -1; /* 1, 0; -1: not known yet */
    if (atomic_load(&wanted) < 0)
        atomic_store(&wanted, isatty(fileno(ladder_out())) && !getenv("NO_COLOR"));
    return atomic_load(&wanted) ? code : "";
}

/* As wide as the terminal, so that no line wraps. */
static int ladder_width(void)
{
    struct winsize size = {0};
    const char *columns = getenv("COLUMNS");
    int width = ioctl(fileno(ladder_out()), TIOCGWINSZ, &size) == 0 ? size.ws_col : 0;
    if (width == 0 && columns)
        width = (int)strtol(columns, NULL, 10);
    if (width <= 0)
        width = 80;
    return width < LADDER_LEAST ? LADDER_LEAST : width > LADDER_MOST ? LADDER_MOST : width;
}

/* Shown once in a run of the program. */
static void ladder_legend(void)
{
    static atomic_bool shown;
    if (!atomic_exchange(&shown, true))
        fputs("\n    An id like 5.2.1-g: see RFC2645.txt.\n", ladder_out());
}

static void ladder_mark_tls(struct session *s)
{
    if (!s->io.tls || s->tls_drawn)
        return;
    s->tls_drawn = true;
    fprintf(ladder_out(), "    %s==== TLS: from here on all is encrypted (%s) ====%s\n", colour("\033[1m"),
            SSL_get_version(s->io.tls), colour("\033[0m"));
}

/* Is the clause the one told, or in the section told? A list names the alternatives for a reply: "5.3-c,4-e". */
static bool clause_told(const char *told, const char *clause)
{
    for (;; told++) {
        size_t len = strcspn(told, ",");
        if (strncmp(told, clause, len) == 0)
            return true;
        told += len;
        if (!*told)
            return false;
    }
}

/* Finds the note on a line. A command that this side only reads has no clause told, so its verb decides. */
static const struct note *find_note(const struct note *n, const char *told, int reply, const char *text)
{
    const char *words = reply && strlen(text) > 4 ? text + 4 : text;
    for (; n->clause; n++)
        if ((n->reply == reply || (reply && n->reply == reply / 100)) &&
            (told ? clause_told(told, n->clause) : *n->starts != '\0') &&
            (!n->starts || strncasecmp(words, n->starts, strlen(n->starts)) == 0))
            return n;
    return NULL;
}

/* --step: shows what comes next, and waits for Return. */
static void wait_for_return(struct session *s, enum side who, const char *text, const char *words)
{
    FILE *out = ladder_out();
    int c, first, verb = (int)strcspn(text, " ");
    if (*text == '.' || verb > 8) /* a message, its end, or base64 */
        verb = 0;
    while (s->stepwise) {
        fprintf(out, "    Next, the %s: %.*s%s%s. (Return, q, ?) ", who == PROVIDER ? "provider" : "customer", verb,
                text, verb > 0 && *words ? ", " : "", words);
        fflush(out);
        first = c = getchar();
        while (c != '\n' && c != EOF)
            c = getchar();
        s->stepwise = c != EOF;
        if (!isatty(STDIN_FILENO))
            fputc('\n', out);
        fflush(out);
        if (first == 'q')
            raise(SIGTERM); /* which removes the scratch directory */
        if (first != '?')
            return;
        fputs("    Return: the next command. q: quit. ?: this help.\n", out);
    }
}

/* Returns the number of the command that the line is or replies to, because replies come in the order of the commands.
 * 0: no number. EHLO, the first command, has none, because PIPELINING is not known yet. */
static int ladder_number(struct session *s, bool command, const char *text)
{
    bool final = !command && isdigit((unsigned char)*text) && strlen(text) >= 3 && text[3] != '-';
    unsigned number;
    if (s->state != REVERSED)
        return 0;
    if (!command && strncmp(text, "250-PIPELINING", 14) == 0)
        s->numbered = true;
    if (command && strncmp(text, "...", 3) == 0) /* the octets of a message */
        return 0;
    if (command)
        s->commands_drawn++;
    else if (s->replies_drawn < s->commands_drawn)
        s->replies_drawn += final;
    else
        final = false; /* the greeting */
    number = command ? s->commands_drawn : s->replies_drawn;
    return s->numbered && (command || final) && number > 1 ? (int)(number % 1000) : 0;
}

/* Names a message of an AUTH exchange by its form. Of the customer's messages only a part that cannot contain a secret
 * is shown: the first *shown octets. */
static const char *sasl_message_name(enum side who, const char *text, bool external, size_t *shown)
{
    const char *proof = strstr(text, ",p="), *digest = strrchr(text, ' ');
    bool keyed = digest && strlen(digest) == 33 && strspn(digest + 1, "0123456789abcdef") == 32;
    *shown = strlen(text);
    if (who == PROVIDER)
        return strncmp(text, "r=", 2) == 0   ? "server-first-message"
               : strncmp(text, "v=", 2) == 0 ? "server-final-message"
                                             : "challenge";
    if (external)
        return "name";
    if (strchr("nyp", *text) && strstr(text, ",n=") && strstr(text, ",r="))
        return "client-first-message";
    if (strncmp(text, "c=", 2) == 0 && proof) {
        *shown = (size_t)(proof - text) + 3;
        return "client-final-message";
    }
    *shown = keyed ? (size_t)(digest - text) + 1 : 0;
    return "response";
}

/* Below the arrow of a challenge or a response: its decoded base64, on as many lines as it needs. */
static void ladder_decode(const struct session *s, enum side who, const char *clause, const char *text, int width)
{
    char plain[LADDER_DECODED], line[4 * sizeof plain + 64];
    const char *encoded = NULL, *name;
    size_t shown, len, used, part = (size_t)width - 9;
    bool external = false;
    if (s->state != INITIAL)
        return;
    if (who == PROVIDER && strncmp(text, "334 ", 4) == 0) {
        encoded = text + 4;
    } else if (who == CUSTOMER && strncasecmp(text, "AUTH ", 5) == 0) {
        if ((encoded = strchr(text + 5, ' ')))
            encoded++;
        external = strncasecmp(text, "AUTH EXTERNAL ", 14) == 0;
    } else if (who == CUSTOMER && clause && strcmp(clause, "5.1.2-a") == 0) {
        encoded = text;
    }
    if (!encoded || base64_decode(plain, sizeof plain, encoded) <= 0)
        return;

    name = sasl_message_name(who, plain, external, &shown);
    len = strlen(plain);
    plain[shown] = '\0';
    used = (size_t)snprintf(line, sizeof line, "= %s: ", name);
    escape(line + used, sizeof line - used, plain);
    used = strlen(line);
    snprintf(line + used, sizeof line - used, "%s", shown < len ? "(not shown)" : "");
    for (const char *at = line; *at; at += strnlen(at, part))
        fprintf(ladder_out(), "      %s%.*s\n", at == line ? "" : "  ", (int)part, at);
}

/* Not inline, because trace_line() would then need the stack for this in each session, even if it draws nothing. */
__attribute__((noinline))
static void ladder_line(struct session *s, enum side who, const char *clause, const char *text)
{
    static const char dashes[] = "--------------------------------------------------------------------------------"
                                 "----------------------------------------";
    bool reversed = s->state == REVERSED, command = who == (reversed ? PROVIDER : CUSTOMER);
    int reply = command ? 0 : atoi(text), width = ladder_width(), len = (int)strlen(text);
    const struct note *note = clause || command ? find_note(notes[reversed], clause, reply, text) : NULL;
    int room = width - LADDER_MARGINS + 1 - snprintf(NULL, 0, "%lu", s->number), number;
    const char *dots, *end = colour("\033[0m");
    char join[16] = "";
    if (!note)
        note = find_note(other_replies, "", reply, text);
    if (command)
        wait_for_return(s, who, text, note ? note->words : "");
    number = ladder_number(s, command, text);
    if (number > 0)
        room -= snprintf(join, sizeof join, "%d", number);
    dots = len > room ? "..." : "";
    len = len > room ? room - 3 : len;
    room -= len + (int)strlen(dots);

    flockfile(ladder_out());
    ladder_legend();
    ladder_mark_tls(s);
    if (command && number == 2 && s->commands_drawn == 2)
        fputs("    A number joins a reply to its command.\n", ladder_out());
    fprintf(ladder_out(), "[%lu] |%s", s->number, colour(who == PROVIDER ? "\033[34m" : "\033[32m"));
    if (who == CUSTOMER)
        fprintf(ladder_out(), "- %.*s%s %.*s%s>", len, text, dots, room + 1, dashes, join);
    else
        fprintf(ladder_out(), "<%s%.*s %.*s%s -", join, room + 1, dashes, len, text, dots);
    fprintf(ladder_out(), "%s|", end);
    if (note)
        fprintf(ladder_out(), " %s%-8s%s %s", colour("\033[1m"), note->clause, end, note->words);
    fputc('\n', ladder_out());
    ladder_decode(s, who, clause, text, width);
    funlockfile(ladder_out());
}

static const char *const state_names[] = {"initial", "authenticated", "reversed"};

/* The RFC's three states, the current one in capitals. */
static void ladder_state(struct session *s)
{
    static const char *const capital[] = {"INITIAL", "AUTHENTICATED", "REVERSED"};
    static const char *const box[] = {"+---------+", "+---------------+", "+----------+"};
    static const char *const heavy[] = {"+=========+", "+===============+", "+==========+"};
    const char *name[3], *frame[3];
    FILE *out = ladder_out();
    int width = ladder_width();
    for (int i = 0; i < 3; i++) {
        name[i] = i == (int)s->state ? capital[i] : state_names[i];
        frame[i] = i == (int)s->state ? heavy[i] : box[i];
    }
    flockfile(out);
    ladder_legend();
    fprintf(out, "\n%s    %s AUTH %s ATRN %s\n", colour("\033[1m"), frame[0], frame[1], frame[2]);
    fprintf(out, "    | %s |----->| %s |----->| %s |%s\n", name[0], name[1], name[2],
            width < 80 ? "" : "   QUIT ends each (5-a)");
    fprintf(out, "    %s      %s      %s\n%s\n", frame[0], frame[1], frame[2], colour("\033[0m"));
    fprintf(out, "    customer: %-10s %*s\n", s->state == REVERSED ? "now server" : "client",
            width - LADDER_MARGINS - 14, s->state == REVERSED ? "provider: now client" : "provider: server");
    funlockfile(out);
}

/* P: marks the provider's lines and C: the customer's, in the traces of both sides. */
void trace_line(struct session *s, enum side who, const char *clause, const char *fmt, ...)
{
    char plain[LOG_LINE], safe[LOG_LINE * 2];
    va_list args;
    if (!s->trace || (ladder_from_reversal && s->state != REVERSED))
        return;
    va_start(args, fmt);
    vsnprintf(plain, sizeof plain, fmt, args);
    va_end(args);
    escape(safe, sizeof safe, plain);
    if (s->trace == TRACE_LADDER)
        ladder_line(s, who, clause, safe);
    else
        fprintf(stderr, "[%lu] %c: %s\n", s->number, who == PROVIDER ? 'P' : 'C', safe);
}

void enter_state(struct session *s, enum state state)
{
    static const char *const title[] = {
        [INITIAL] = "initial state (RFC 2645, 5.1)",
        [AUTHENTICATED] = "authenticated state (RFC 2645, 5.2)",
        [REVERSED] = "reversed state (RFC 2645, 5.3): the provider is now the client",
    };
    s->state = state;
    if (ladder_file && s->trace && state == REVERSED)
        ladder_waits = s->io.waits;
    if (s->trace == TRACE_LADDER && (!ladder_from_reversal || state == REVERSED))
        ladder_state(s);
    else if (s->trace == TRACE_RFC)
        fprintf(stderr, "[%lu] -- %s\n", s->number, title[state]);
}

/* ---- Progress and summary ---- */

void show_progress(struct session *s, size_t messages, uint64_t octets)
{
    int64_t now = s->progress ? now_ms() : 0;
    if (!s->progress || now - s->last_progress < PROGRESS_MS)
        return;
    s->last_progress = now;
    atomic_store(&progress_shown, true);
    fprintf(stderr, "\rodmr: %zu message%s, %llu octets ", messages, plural(messages), (unsigned long long)octets);
}

void show_summary(const struct session *s, const char *what, size_t messages, uint64_t octets)
{
    clear_progress();
    if (!s->quiet)
        log_event(s, LOG_INFO, "%zu message%s, %llu octets %s", messages, plural(messages), (unsigned long long)octets,
                  what);
}

/* ==== 13. Programs ===================================================================================
 *
 * This program runs sendmail for notices, and the command of --exec. There is no shell, except for --exec. Of all that
 * a peer sends only an address can be part of a command, and it comes after "--". */

#define KILL_AFTER_MS 5000       /* when a program is ended, the time from SIGTERM to SIGKILL */

int start_program(char *const argv[], int in, int out, pid_t *pid)
{
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    sigset_t reset, none;
    int problem;
    sigemptyset(&none);
    sigfillset(&reset);
    sigdelset(&reset, SIGHUP); /* nohup and a shell's & apply to the program too */
    sigdelset(&reset, SIGINT);
    sigdelset(&reset, SIGQUIT);
    posix_spawnattr_init(&attributes);
    posix_spawnattr_setsigdefault(&attributes, &reset);
    posix_spawnattr_setsigmask(&attributes, &none);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETPGROUP);
    posix_spawn_file_actions_init(&actions);
    problem = in >= 0 ? posix_spawn_file_actions_adddup2(&actions, in, STDIN_FILENO) : 0;
    if (!problem && out >= 0)
        problem = posix_spawn_file_actions_adddup2(&actions, out, STDOUT_FILENO);
    if (!problem) /* else it would not have the input and output meant for it */
        problem = posix_spawnp(pid, argv[0], &actions, &attributes, argv, environ);
    posix_spawn_file_actions_destroy(&actions);
    posix_spawnattr_destroy(&attributes);
    return problem;
}

int finish_program(pid_t pid, int seconds)
{
    int64_t until = now_ms() + (int64_t)seconds * 1000;
    int status = -1, pause = 1, told = 0;
    bool ended = false;
    for (;;) {
        ended = ended || waitpid(pid, &status, WNOHANG) != 0;
        if (ended && (told == 0 || kill(-pid, 0) < 0)) /* if it was ended here, its children are ended too */
            break;
        if (now_ms() >= until) {
            if (told == SIGKILL)
                break;
            told = told == 0 ? SIGTERM : SIGKILL;
            kill(-pid, told);
            until = now_ms() + KILL_AFTER_MS;
        }
        poll(NULL, 0, pause);
        pause = pause < 100 ? pause * 2 : pause;
    }
    return told == 0 && WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/* ==== 14. The caretaker ==============================================================================
 *
 * The caretaker is a thread that scans the queue every hour. It removes unfinished files. It returns messages that no
 * customer has collected for --max-age days to their senders. It never delivers mail: only ATRN does (4-d). */

#define CARE_INTERVAL 3600       /* seconds between two scans of the queue */

/* Returns one message that is too old, unless a session has claimed it. False: the others are not tried now. */
static bool expire_message(struct provider *p, const char *path)
{
    char why[REFUSAL_SIZE];
    struct message m;
    int64_t began = now_ms();
    bool go_on = true;
    snprintf(why, sizeof why, "4.4.7 The recipient's server has not collected the message for %d days", p->max_age);
    if (message_claim(&m, p->queue, path) == CLAIMED) {
        for (size_t i = 0; i < m.recipients; i++)
            if (m.list[i].fate == OWED && (m.list[i].reason = message_reason(&m, 0, why))) {
                m.list[i].fate = REFUSED;
                log_fate(NULL, LOG_NOTICE, "expired", &m, &m.list[i], why);
            }
        go_on = update_queue(p, NULL, &m) && now_ms() - began < NOTICE_TIMEOUT * 1000; /* else sendmail hangs */
    }
    message_close(&m);
    return go_on;
}

/* Has a file entered or left the domain's new after `oldest`, and before this start? Then the clock is right. */
static bool changed_lately(const struct provider *p, const char *domain, int64_t oldest)
{
    char box[MAILDIR_PATH];
    struct stat st;
    snprintf(box, sizeof box, "%s/new", domain);
    return fstatat(p->queue, box, &st, AT_SYMLINK_NOFOLLOW) == 0 && st.st_mtim.tv_sec > oldest &&
           st.st_mtim.tv_sec <= p->started;
}

/* If the clock is years ahead when the provider starts, all mail seems too old. If even the newest message of a domain
 * is too old, and nothing shows that the clock is right, the first scan leaves them queued. The next scan, an hour
 * later, returns them. */
static void expire_domain(struct provider *p, struct backlog *b, const char *domain)
{
    int64_t oldest = time(NULL) - (int64_t)p->max_age * 86400;
    size_t i = 0;
    if (p->first_look && b->count > 0 && b->list[b->count - 1].second <= oldest &&
        !changed_lately(p, domain, oldest)) {
        log_event(NULL, LOG_ERR, "all mail of %s is older than --max-age %d days: none is returned for an hour; check "
                                 "the clock", domain, p->max_age);
        return;
    }
    while (i < b->count && b->list[i].second <= oldest && !atomic_load(&p->stopping) &&
           expire_message(p, b->list[i].path))
        i++;
}

static bool care_for_domain(void *context, int queue, const char *domain)
{
    struct provider *p = context;
    struct backlog b;
    clean_domain(NULL, queue, domain);
    if (p->max_age > 0) {
        backlog_read(&b, NULL, queue, domain);
        expire_domain(p, &b, domain);
        backlog_free(&b);
    }
    return !atomic_load(&p->stopping);
}

static void *caretaker(void *argument)
{
    struct provider *p = argument;
    struct pollfd wake = {.fd = p->wake_fd, .events = POLLIN};
    p->first_look = true;
    p->started = time(NULL);
    do {
        for_each_domain(p->queue, care_for_domain, p);
        p->first_look = false;
    } while (poll(&wake, 1, CARE_INTERVAL * 1000) == 0);
    return NULL;
}

/* ==== 14. The listener ===============================================================================
 *
 * One thread accepts connections, and each connection has a thread that serves it. Threads share only what struct
 * provider marks as shared, under its lock or as an atomic. Signals are delivered to the accepting thread alone, and
 * only between two connections. No other thread is ever interrupted by a signal. */

#define LISTEN_BACKLOG 1024
#define ACCEPT_PAUSE_MS 100
#define REFUSALS_MS 5000         /* for so long after one logged refusal, others are only counted */
#define THREAD_STACK (1 << 20)  /* octets; only touched pages take memory */
#define CERTIFICATE_DAYS 14      /* the log warns of a certificate that expires sooner */

static volatile sig_atomic_t told_to_stop, told_to_reload, told_to_report;

static void on_signal(int number)
{
    if (number == SIGHUP)
        told_to_reload = 1;
    else if (number == SIGUSR1)
        told_to_report = 1;
    else
        told_to_stop = 1;
}

/* From here on these signals are blocked, except in serve(), in this thread and in the threads that it starts. */
static void catch_signals(void)
{
    static const int numbers[] = {SIGTERM, SIGINT, SIGHUP, SIGUSR1};
    struct sigaction action = {.sa_handler = on_signal};
    sigset_t held;
    sigemptyset(&action.sa_mask);
    sigemptyset(&held);
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        sigaction(numbers[i], &action, NULL);
        sigaddset(&held, numbers[i]);
    }
    pthread_sigmask(SIG_BLOCK, &held, NULL);
}

/* From here on a second SIGTERM or SIGINT ends the program at once, even if it has arrived before. */
static void release_signals(void)
{
    sigset_t held;
    signal(SIGTERM, SIG_DFL);
    signal(SIGINT, SIG_DFL);
    sigemptyset(&held);
    sigaddset(&held, SIGTERM);
    sigaddset(&held, SIGINT);
    pthread_sigmask(SIG_UNBLOCK, &held, NULL);
}

static void name_of_socket(int fd, char *out, size_t size)
{
    struct sockaddr_storage address = {.ss_family = AF_UNSPEC};
    socklen_t len = sizeof address;
    getsockname(fd, (struct sockaddr *)&address, &len);
    address_text(out, size, &address, len);
}

static void listen_on_address(struct provider *p, const struct addrinfo *a, const char *where, bool tls)
{
    int fd = socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC, a->ai_protocol);
    if (fd < 0 && errno == EAFNOSUPPORT)
        return;
    if (fd < 0)
        die(EX_OSERR, "%s: cannot listen: %s", where, strerror(errno));
    if (p->socket_count == LISTENERS_MAX)
        die(EX_USAGE, "%s: cannot listen: more than %d sockets", where, LISTENERS_MAX);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int));
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &(int){RECEIVE_BUFFER}, sizeof(int)); /* see part 3 */
    if (a->ai_family == AF_INET6)
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &(int){1}, sizeof(int));
    if (bind(fd, a->ai_addr, a->ai_addrlen) < 0 || listen(fd, LISTEN_BACKLOG) < 0)
        die(EX_OSERR, "%s: cannot listen: %s", where, strerror(errno));
    fcntl(fd, F_SETFL, O_NONBLOCK); /* accept() must not wait if the connection was lost meanwhile */
    p->socket_tls[p->socket_count] = tls;
    p->sockets[p->socket_count++] = fd;
}

static void listen_on(struct provider *p, const char *where, bool tls)
{
    char host[256], port[32];
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE}, *list;
    size_t before = p->socket_count;
    int problem;
    if (!split_host_port(where, NULL, host, sizeof host, port, sizeof port))
        die(EX_USAGE, "%s: not ADDR:PORT", where);
    problem = getaddrinfo(*host && strcmp(host, "*") != 0 ? host : NULL, port, &hints, &list);
    if (problem)
        die(EX_NOHOST, "%s: %s", where, gai_strerror(problem));
    for (struct addrinfo *a = list; a; a = a->ai_next)
        listen_on_address(p, a, where, tls);
    freeaddrinfo(list);
    if (p->socket_count == before)
        die(EX_OSERR, "%s: cannot listen: %s", where, strerror(EAFNOSUPPORT));
}

static const unsigned char ipv4_mapped[12] = "\0\0\0\0\0\0\0\0\0\0\xff\xff";

static bool is_ipv4(const unsigned char address[16])
{
    return memcmp(address, ipv4_mapped, sizeof ipv4_mapped) == 0;
}

/* Parses ADDR or ADDR/BITS. An IPv4 address is stored in its IPv6 form, so that one comparison is enough. */
bool network_parse(struct network *n, const char *text)
{
    char address[64];
    struct in_addr four;
    size_t len = strcspn(text, "/"), digits = text[len] ? strspn(text + len + 1, "0123456789") : 0;
    if (len >= sizeof address || (text[len] && (digits == 0 || digits > 3 || text[len + 1 + digits])))
        return false;
    memcpy(address, text, len);
    address[len] = '\0';
    n->bits = 128;
    if (inet_pton(AF_INET, address, &four) == 1) {
        memcpy(n->address, ipv4_mapped, 12);
        memcpy(n->address + 12, &four, 4);
        n->bits = digits > 0 ? atoi(text + len + 1) + 96 : 128;
    } else if (inet_pton(AF_INET6, address, n->address) != 1) {
        return false;
    } else if (digits > 0) {
        n->bits = atoi(text + len + 1);
    }
    return n->bits <= 128;
}

static void address_bytes(unsigned char out[16], const struct sockaddr_storage *a)
{
    memcpy(out, ipv4_mapped, 12);
    if (a->ss_family == AF_INET)
        memcpy(out + 12, &((const struct sockaddr_in *)a)->sin_addr, 4);
    else
        memcpy(out, &((const struct sockaddr_in6 *)a)->sin6_addr, 16);
}

/* A prefix of less than 96 bits has IPv6 addresses only, so no IPv4 address is in ::/0. */
static bool network_has(const struct network *n, const unsigned char address[16])
{
    int whole = n->bits / 8, rest = n->bits % 8;
    return !(n->bits < 96 && is_ipv4(address)) && memcmp(n->address, address, (size_t)whole) == 0 &&
           (rest == 0 || (n->address[whole] ^ address[whole]) >> (8 - rest) == 0);
}

/* 8-a: access by address is checked before AUTH. It supplements AUTH and does not replace it. */
static bool address_allowed(const struct provider *p, const unsigned char address[16])
{
    for (size_t i = 0; i < p->allow_count; i++)
        if (network_has(&p->allow[i], address))
            return true;
    return p->allow_count == 0;
}

/* ---- Sessions and their count ---- */

static void session_free(struct session *s)
{
    struct provider *p = s->provider;
    struct session **at = &p->sessions;
    pthread_mutex_lock(&p->lock);
    while (*at && *at != s)
        at = &(*at)->next;
    if (*at)
        *at = s->next;
    pthread_mutex_unlock(&p->lock);
    accounts_release(s->accounts);
    SSL_CTX_free(s->tls_context);
    free(s);
}

/* The last step of a session. After it the process may end, and OpenSSL with it. */
static void session_over(struct provider *p)
{
    pthread_mutex_lock(&p->lock);
    p->session_count--;
    pthread_cond_signal(&p->session_ended);
    pthread_mutex_unlock(&p->lock);
}

static void *session_thread(void *argument)
{
    struct session *s = argument;
    struct provider *p = s->provider;
    provider_session(s);
    session_free(s);
    OPENSSL_thread_stop(); /* else OpenSSL frees a thread's data only after the thread has ended */
    session_over(p);
    return NULL;
}

/* Adds the session to the list. Returns NULL, or why not if there are too many sessions. */
static const char *session_admit(struct provider *p, struct session *s)
{
    const char *why = NULL;
    struct network here = {.bits = is_ipv4(s->address) ? 128 : 64}; /* with IPv6, one customer may have a /64 */
    size_t from_here = 0;
    memcpy(here.address, s->address, sizeof here.address);
    pthread_mutex_lock(&p->lock);
    for (const struct session *other = p->sessions; other; other = other->next)
        from_here += network_has(&here, other->address);
    if (p->session_count >= (size_t)p->max_sessions)
        why = "too many sessions";
    else if (from_here >= (size_t)p->max_per_address)
        why = "too many sessions from your address";
    if (!why) {
        s->tls_context = p->tls_context;
        if (s->tls_context)
            SSL_CTX_up_ref(s->tls_context);
        s->next = p->sessions;
        p->sessions = s;
        p->session_count++;
    }
    pthread_mutex_unlock(&p->lock);
    return why;
}

/* Is this refused connection logged? The first one is. Those of the next seconds are only counted, so that a flood of
 * connections does not fill the disk. Only the accepting thread calls this. */
static bool refusal_shown(struct provider *p)
{
    if (now_ms() < p->refusals_until) {
        p->refusals++;
        return false;
    }
    p->refusals_until = now_ms() + REFUSALS_MS;
    return true;
}

static void report_refusals(struct provider *p)
{
    if (p->refusals > 0)
        log_event(NULL, LOG_WARNING, "%zu more connection%s refused", p->refusals,
                  p->refusals == 1 ? " was" : "s were");
    p->refusals = 0;
}

/* Replies to a connection that is turned away, and closes it. Never waits, so there is no reply over implicit TLS. */
static void turn_away(struct provider *p, int fd, const struct session *s, bool tls_at_once, const char *code,
                      const char *why)
{
    char text[512];
    int n = snprintf(text, sizeof text, "%s %s %s\r\n", code, p->name, why);
    if (refusal_shown(p))
        log_event(s, LOG_WARNING, "%s refused: %s %s %s", s ? s->peer : "a connection was", code, p->name, why);
    if (!tls_at_once)
        send(fd, text, (size_t)n, MSG_NOSIGNAL | MSG_DONTWAIT);
    shutdown(fd, SHUT_WR);
    close(fd);
}

static void start_session(struct provider *p, int fd, const struct sockaddr_storage *address, socklen_t len,
                          bool tls_at_once)
{
    struct session *s = session_new(fd, PROVIDER, p->timeout, p->name, p->trace);
    const char *why;
    pthread_t thread;
    if (!s) {
        turn_away(p, fd, NULL, tls_at_once, "421", "out of memory, closing connection");
        return;
    }
    address_text(s->peer, sizeof s->peer, address, len); /* getpeername() fails if the connection is lost already */
    address_bytes(s->address, address);
    s->provider = p;
    s->tls_at_once = tls_at_once;
    if (!address_allowed(p, s->address)) {
        turn_away(p, fd, s, tls_at_once, "554", "does not serve your address");
    } else if ((why = session_admit(p, s))) {
        turn_away(p, fd, s, tls_at_once, "421", why);
    } else {
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
        if (pthread_create(&thread, &p->thread_attributes, session_thread, s) == 0)
            return;
        turn_away(p, fd, s, tls_at_once, "421", "cannot serve you now, closing connection");
        session_over(p);
    }
    session_free(s);
}

static void accept_session(struct provider *p, size_t i)
{
    struct sockaddr_storage address = {0};
    socklen_t len = sizeof address;
    int fd = accept4(p->sockets[i], (struct sockaddr *)&address, &len, SOCK_CLOEXEC);
    if (fd >= 0) {
        start_session(p, fd, &address, len, p->socket_tls[i]);
    } else if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
        if (refusal_shown(p))
            log_event(NULL, LOG_ERR, "cannot accept a connection: %s; trying again", strerror(errno));
        poll(NULL, 0, ACCEPT_PAUSE_MS);
    }
}

/* ---- Start, reload, stop ---- */

/* A TLS handshake of this program with itself, in memory, with at most that version; 0: the latest. */
static bool tls_rehearsed(SSL_CTX *context, int version)
{
    SSL_CTX *other = SSL_CTX_new(TLS_client_method());
    SSL *server = SSL_new(context), *client = other ? SSL_new(other) : NULL;
    BIO *here, *there;
    bool done = false;
    if (server && client && SSL_set_max_proto_version(client, version) == 1 &&
        BIO_new_bio_pair(&here, 0, &there, 0) == 1) {
        SSL_set_bio(server, here, here);
        SSL_set_bio(client, there, there);
        SSL_set_accept_state(server);
        SSL_set_connect_state(client);
        for (int turns = 0; turns < 100 && !done; turns++) {
            done = SSL_do_handshake(client) == 1;
            done &= SSL_do_handshake(server) == 1;
        }
    }
    SSL_free(server);
    SSL_free(client);
    SSL_CTX_free(other);
    ERR_clear_error();
    return done;
}

/* OpenSSL fetches an algorithm when it is first used. If that fails in a session, for lack of memory, the algorithm is
 * missing until the program starts again. So all of them are used once before there are sessions. */
static void fetch_algorithms(const struct provider *p)
{
    struct scram_keys keys;
    char text[33];
    if (!p->no_cram_md5 && !cram_md5_digest(text, "secret", "challenge"))
        log_event(NULL, LOG_ERR, "OpenSSL cannot compute CRAM-MD5; AUTH is answered 454; see --no-cram-md5");
    if (!scram_keys(&keys, "secret", (const unsigned char *)"salt", 4, SCRAM_ITERATIONS) ||
        RAND_bytes(keys.client, sizeof keys.client) != 1)
        log_event(NULL, LOG_ERR, "OpenSSL cannot compute SCRAM-SHA-256; AUTH is answered 454");
    if (p->tls_context && !tls_rehearsed(p->tls_context, 0))
        log_event(NULL, LOG_ERR, "%s: a TLS handshake with it fails, and so it will with customers", p->cert);
    if (p->tls_context)
        tls_rehearsed(p->tls_context, TLS1_2_VERSION); /* may fail: the system's configuration can forbid it */
}

/* Loads both or neither, because new accounts with an old certificate would confuse the administrator. */
static bool load_configuration(struct provider *p, struct accounts **accounts, SSL_CTX **tls, char *why, size_t size)
{
    *tls = NULL;
    *accounts = accounts_load(p->accounts_path, why, size);
    if (!*accounts || !p->cert)
        return *accounts != NULL;
    *tls = tls_server_context(p->cert, p->key, p->client_ca, why, size);
    if (*tls)
        return true;
    accounts_release(*accounts);
    return false;
}

/* Warns of what will make log-ins fail. */
static void warn_of_configuration(const struct provider *p, const struct accounts *accounts, SSL_CTX *tls)
{
    const X509 *certificate = tls ? SSL_CTX_get0_certificate(tls) : NULL;
    int days, seconds;
    if (accounts->count == 0)
        log_event(NULL, LOG_WARNING, "%s (--accounts) has no account: nobody can log in", p->accounts_path);
    if (!certificate || ASN1_TIME_diff(&days, &seconds, NULL, X509_get0_notAfter(certificate)) != 1)
        return;
    if (days < 0 || seconds < 0)
        log_event(NULL, LOG_WARNING, "--cert %s: the certificate has expired, and customers refuse it; renew it, then "
                                     "send SIGHUP", p->cert);
    else if (days < CERTIFICATE_DAYS)
        log_event(NULL, LOG_WARNING, "--cert %s: the certificate expires in %d day%s; renew it, then send SIGHUP",
                  p->cert, days, plural((uint64_t)days));
}

static void reload(struct provider *p)
{
    char why[PATH_MAX + 256];
    struct accounts *accounts, *old_accounts;
    SSL_CTX *tls, *old_tls;
    if (!load_configuration(p, &accounts, &tls, why, sizeof why)) {
        log_event(NULL, LOG_ERR, "reload failed: %s; the old accounts and certificates stay in use", why);
        return;
    }
    if (accounts->count == 0 && p->accounts->count > 0) { /* it is probably being written, not emptied */
        log_event(NULL, LOG_ERR, "reload failed: %s (--accounts) has no account; the old accounts and certificates "
                                 "stay in use", p->accounts_path);
        accounts_release(accounts);
        SSL_CTX_free(tls);
        return;
    }
    log_event(NULL, LOG_NOTICE, "accounts read again: %zu%s", accounts->count, tls ? "; certificates too" : "");
    warn_of_configuration(p, accounts, tls);
    pthread_mutex_lock(&p->lock);
    old_accounts = p->accounts;
    old_tls = p->tls_context;
    p->accounts = accounts;
    p->tls_context = tls;
    pthread_mutex_unlock(&p->lock);
    accounts_release(old_accounts);
    SSL_CTX_free(old_tls);
}

/* SIGUSR1: logs all sessions. What a session changes meanwhile is atomic, and it leaves the list before it is freed. */
static void report_sessions(struct provider *p)
{
    pthread_mutex_lock(&p->lock);
    log_event(NULL, LOG_NOTICE, "%zu session%s", p->session_count, plural(p->session_count));
    for (const struct session *s = p->sessions; s; s = s->next) {
        enum state state = s->state; /* read first: a session has its account before it enters the next state */
        const struct account *account = s->account;
        size_t messages = s->messages;
        log_event(s, LOG_NOTICE, "%s, %s%s, %s state, %zu message%s so far", s->peer,
                  account ? "account " : "no account yet", account ? account->name : "", state_names[state], messages,
                  plural(messages));
    }
    pthread_mutex_unlock(&p->lock);
}

static void drop_privileges(const char *user)
{
    struct passwd *pw = getpwnam(user);
    if (!pw)
        die(EX_NOUSER, "--user %s: no such user", user);
    if (initgroups(user, pw->pw_gid) < 0 || setgid(pw->pw_gid) < 0 || setuid(pw->pw_uid) < 0)
        die(EX_NOPERM, "--user %s: %s", user, strerror(errno));
    if (pw->pw_uid != 0 && setuid(0) == 0)
        die(EX_SOFTWARE, "--user %s: the privileges did not go away", user);
}

/* --user: checks what this user needs now and at SIGHUP. If access is missing, says what helps and ends the program. */
static bool check_domain_access(void *context, int queue, const char *domain)
{
    static const char *const part[] = {"", "/new", "/cur", "/tmp"};
    const struct provider *p = context;
    char path[MAILDIR_PATH];
    for (size_t i = 0; i < sizeof part / sizeof *part; i++) {
        snprintf(path, sizeof path, "%s%s", domain, part[i]);
        if (faccessat(queue, path, R_OK | W_OK | X_OK, 0) < 0 && (errno == EACCES || errno == EROFS))
            die(EX_CONFIG, "%s/%s: --user %s may not read and write there (%s); do: chown -R %s %s", p->queue_path,
                path, p->user, strerror(errno), p->user, p->queue_path);
    }
    return true;
}

static void check_access(struct provider *p)
{
    const char *const files[][2] = {{"--accounts", p->accounts_path}, {"--cert", p->cert}, {"--key", p->key},
                                    {"--client-ca", p->client_ca}};
    for (size_t i = 0; i < sizeof files / sizeof *files; i++)
        if (files[i][1] && access(files[i][1], R_OK) < 0 && errno == EACCES)
            die(EX_CONFIG, "%s %s: --user %s may not read it; do: chown %s %s, and let that user into its directory",
                files[i][0], files[i][1], p->user, p->user, files[i][1]);
    if (!for_each_domain(p->queue, check_domain_access, p))
        die(EX_CONFIG, "%s: --user %s may not read it (%s); do: chown -R %s %s", p->queue_path, p->user,
            strerror(errno), p->user, p->queue_path);
}

/* Raises the limit as far as allowed, because each session has a descriptor open and each message under way another. */
static void raise_descriptor_limit(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

/* After the first SIGTERM or SIGINT the pipe wakes up sessions that wait for a command. The others finish the message
 * under way. A second signal ends the program at once; mail that was not acknowledged stays queued. */
static void stop_sessions(struct provider *p, int wake_fd)
{
    atomic_store(&p->stopping, true);
    close(wake_fd); /* the writing end; the reading end, which every session watches, is readable now */
    release_signals();
    pthread_mutex_lock(&p->lock);
    log_event(NULL, LOG_NOTICE, "stopping; %zu session%s to end", p->session_count, plural(p->session_count));
    while (p->session_count > 0)
        pthread_cond_wait(&p->session_ended, &p->lock);
    pthread_mutex_unlock(&p->lock);
    log_event(NULL, LOG_NOTICE, "stopped");
}

/* Does what SIGHUP and SIGUSR1 request. ppoll() delivers no signal while a connection waits, so the pending signals are
 * delivered here first. False: SIGTERM or SIGINT has arrived. */
static bool heed_signals(struct provider *p)
{
    sigset_t none, held;
    sigemptyset(&none);
    pthread_sigmask(SIG_SETMASK, &none, &held);
    pthread_sigmask(SIG_SETMASK, &held, NULL);
    if (told_to_reload) {
        told_to_reload = 0;
        reload(p);
    }
    if (told_to_report) {
        told_to_report = 0;
        report_sessions(p);
    }
    return !told_to_stop;
}

static void serve(struct provider *p)
{
    static const struct timespec second = {.tv_sec = 1};
    struct pollfd ready[LISTENERS_MAX];
    sigset_t none;
    sigemptyset(&none);
    while (heed_signals(p)) {
        if (now_ms() >= p->refusals_until)
            report_refusals(p);
        for (size_t i = 0; i < p->socket_count; i++)
            ready[i] = (struct pollfd){.fd = p->sockets[i], .events = POLLIN};
        if (ppoll(ready, p->socket_count, p->refusals > 0 ? &second : NULL, &none) <= 0)
            continue;
        for (size_t i = 0; i < p->socket_count; i++)
            if (ready[i].revents)
                accept_session(p, i);
    }
    report_refusals(p);
}

int provider_run(struct provider *p)
{
    char why[PATH_MAX + 256], name[96];
    pthread_t care;
    bool cared_for;
    int wake[2];
    log_start();
    p->queue = open_queue(p->queue_path, false);
    if (p->queue < 0)
        die(EX_CONFIG, "cannot open the queue directory %s (--queue): %s", p->queue_path, strerror(errno));
    if (!load_configuration(p, &p->accounts, &p->tls_context, why, sizeof why))
        die(EX_CONFIG, "%s", why);
    fetch_algorithms(p);
    raise_descriptor_limit();
    for (size_t i = 0; i < p->listen_count; i++)
        listen_on(p, p->listen[i], p->listen_tls[i]);
    catch_signals();
    if (p->user) {
        drop_privileges(p->user);
        check_access(p);
    }
    warn_of_configuration(p, p->accounts, p->tls_context);
    if (pipe2(wake, O_CLOEXEC) < 0)
        die(EX_OSERR, "cannot make a pipe: %s", strerror(errno));
    p->wake_fd = wake[0];
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->session_ended, NULL);
    pthread_attr_init(&p->thread_attributes);
    pthread_attr_setstacksize(&p->thread_attributes, THREAD_STACK);
    for (size_t i = 0; i < p->socket_count; i++) {
        name_of_socket(p->sockets[i], name, sizeof name);
        log_event(NULL, LOG_NOTICE, "listening on %s", name);
    }
    cared_for = pthread_create(&care, &p->thread_attributes, caretaker, p) == 0;
    if (!cared_for)
        log_event(NULL, LOG_ERR, "cannot start the caretaker's thread: old mail is not returned, and unfinished files "
                                 "stay");
    pthread_attr_setdetachstate(&p->thread_attributes, PTHREAD_CREATE_DETACHED);
    serve(p);
    for (size_t i = 0; i < p->socket_count; i++)
        close(p->sockets[i]);
    stop_sessions(p, wake[1]);
    if (cared_for)
        pthread_join(care, NULL);
    accounts_release(p->accounts);
    SSL_CTX_free(p->tls_context);
    return EX_OK;
}

/* ==== 15. The tools ==================================================================================
 *
 * enqueue puts a message into the queue, queue shows what is in it, account prints a line for the accounts file. */

#define SECRET_LONGEST (SECRET_MAX - 2)
#define TIMEOUT_MAX 86400        /* seconds: the most that --timeout takes */

int open_queue(const char *dir, bool make)
{
    bool made = make && mkdir(dir, 0700) == 0;
    int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (made && fd >= 0)
        sync_directory(fd, "..");
    return fd;
}

/* Files in a queue must belong to the queue's owner, because the provider runs as that user and must read them. So root
 * becomes that user. A link that the owner has put into the queue then cannot lead root elsewhere. */
static void become_owner(int queue, const char *path)
{
    struct stat st = {.st_uid = 0};
    if (fstat(queue, &st) == 0 && geteuid() == 0 && setgid(st.st_gid) == 0 &&
        (st.st_uid == 0 || (setgroups(0, NULL) == 0 && setuid(st.st_uid) == 0)))
        return;
    if (geteuid() == 0 || geteuid() != st.st_uid)
        die(EX_TEMPFAIL, "%s belongs to another user, who could not read the message; nothing is written; run odmr as "
                         "that user or as root", path);
}

/* Copies the message on standard input into each delivery. A From_ line (mbox) on top is dropped, because a mail
 * server's pipe may write one; "From :" is a header field (RFC 5322, 4.5.2). The message may start with an envelope
 * field of an earlier hop, or with a blank, which would continue our envelope. A Received field is then put in between,
 * because what a sender wrote must never become part of the envelope. */
static bool copy_message(FILE *in, struct delivery *d, size_t count, const char *name)
{
    char data[COPY_SIZE];
    size_t value, start = 0, n = fread(data, 1, sizeof data - 1, in);
    data[n] = '\0';
    if (strncmp(data, "From ", 5) == 0 && data[5 + strspn(data + 5, " \t")] != ':' && strchr(data, '\n'))
        start = (size_t)(strchr(data, '\n') + 1 - data);
    if (envelope_field(data + start, &value) != NO_FIELD || data[start] == ' ' || data[start] == '\t')
        for (size_t i = 0; i < count; i++) {
            fprintf(d[i].file, "Received: by %s (odmr enqueue);\n", name);
            write_date(d[i].file, "\t", time(NULL));
        }
    while (n > 0) {
        for (size_t i = 0; i < count; i++)
            fwrite(data + start, 1, n - start, d[i].file);
        start = 0;
        n = fread(data, 1, sizeof data, in);
    }
    return !ferror(in);
}

/* Queues the message on standard input for all recipients or for none. Returns an exit code. */
static int enqueue(int queue, const char *sender, const char *name, char **recipients, int count)
{
    struct delivery *d = must_alloc(calloc((size_t)count, sizeof *d));
    size_t files = deliveries_open(d, queue, sender, recipients, (size_t)count);
    bool copied = files > 0 && copy_message(stdin, d, files, name), stored;
    int problem = errno;

    stored = copied && deliveries_store(d, files);
    if (!stored) {
        log_event(NULL, LOG_ERR, "cannot write the message into the queue: %s; try again later",
                  strerror(files > 0 && !copied ? problem : d->problem));
        deliveries_discard(d, files);
    }
    free(d);
    return stored ? EX_OK : EX_TEMPFAIL;
}

struct domain_summary {
    size_t messages, held;
    uint64_t octets;
    int64_t oldest;
};

/* Lists the envelope of a held message as far as it can be read: every address in it, valid or not. */
static void list_envelope(const struct message *m)
{
    struct line_reader r = {.of = m};
    char address[sizeof r.line], safe[4 * sizeof r.line];
    enum field field = NO_FIELD;
    bool has_sender = false;
    const char *rest;
    while ((rest = next_envelope_line(&r, &field, &has_sender)))
        while (field != DELIVERY_DATE && cut_address(&rest, address, sizeof address)) {
            escape(safe, sizeof safe, address);
            printf("      %s <%s>\n", field == RETURN_PATH ? "from" : "to", safe);
        }
}

static void arrival_text(char out[32], int64_t second)
{
    struct tm tm = local_time((time_t)second);
    strftime(out, 32, "%Y-%m-%d %H:%M:%S", &tm);
}

static void list_message(const struct message *m, int64_t second)
{
    char safe[2 * LOG_LINE], when[32];
    arrival_text(when, second);
    escape(safe, sizeof safe, m->path);
    printf("  %s  %lld  %s\n", when, (long long)m->size, safe);
    if (m->held) {
        printf("      held: %s\n", m->held);
        if (m->size > 0) /* else it is not a regular file, or could not be opened */
            list_envelope(m);
        return;
    }
    escape(safe, sizeof safe, m->sender);
    printf("      from <%s>\n", safe);
    for (size_t i = 0; i < m->recipients; i++) {
        escape(safe, sizeof safe, m->list[i].address);
        printf("      to <%s>\n", safe);
    }
}

/* A row without figures, for a name that is not the directory of a domain or cannot be read. */
static void show_oddity(const char *name, const char *why)
{
    char safe[4 * NAME_MAX + 1];
    escape(safe, sizeof safe, name);
    printf("%-30s %9s %11s  %-19s %5s  %s\n", safe, "-", "-", "-", "-", why);
}

/* Has one of these accounts access to the domain? */
static bool has_account(const struct accounts *accounts, const char *domain)
{
    for (size_t i = 0; i < accounts->count; i++)
        if (domain_in_list(accounts->list[i].domains, domain, strlen(domain)))
            return true;
    return false;
}

static bool summarize_domain(int queue, const char *domain, bool list, const char *remark)
{
    struct domain_summary sum = {0};
    struct backlog b;
    char when[32] = "-";
    if (!backlog_read(&b, NULL, queue, domain)) {
        show_oddity(domain, "cannot be read");
        backlog_free(&b);
        return false;
    }
    if (b.count > 0)
        arrival_text(when, b.list[0].second);
    for (int pass = 0; pass < (list ? 2 : 1); pass++) {
        for (size_t i = 0; i < b.count; i++) {
            struct message m;
            enum claim got = message_open(&m, queue, b.list[i].path, O_RDONLY);
            if (got == CLAIMED)
                got = message_read(&m);
            if (got == BUSY)
                m.held = m.fd < 0 ? "this user cannot open it" : m.trouble;
            if (pass == 0) {
                sum.messages += got == CLAIMED;
                sum.held += m.held != NULL; /* a message that is neither was just removed */
                sum.octets += got == CLAIMED ? (uint64_t)m.size : 0;
            } else if (got == CLAIMED || m.held) {
                list_message(&m, b.list[i].second);
            }
            message_close(&m);
        }
        if (pass == 0)
            printf("%-30s %9zu %11llu  %-19s %5zu%s\n", domain, sum.messages, (unsigned long long)sum.octets, when,
                   sum.held, remark);
    }
    backlog_free(&b);
    return true;
}

/* The folder .Undeliverable of this domain, if there is one. */
static bool summarize_undeliverable(int queue, const char *domain, bool list)
{
    char folder[MAILDIR_PATH];
    struct stat st;
    snprintf(folder, sizeof folder, "%s/%s", domain, UNDELIVERABLE);
    return fstatat(queue, folder, &st, AT_SYMLINK_NOFOLLOW) < 0 || summarize_domain(queue, folder, list, "");
}

/* One name in the queue's directory. False: its mail cannot be listed. */
static bool show_name(int queue, const char *name, bool list, const struct accounts *accounts)
{
    struct stat st;
    const char *remark = "";
    bool done, valid = domain_valid(name, strlen(name));
    if (!valid || (fstatat(queue, name, &st, AT_SYMLINK_NOFOLLOW) == 0 && !S_ISDIR(st.st_mode))) {
        show_oddity(name, valid ? "not a directory: no mail can be in it" : "not a domain: no ATRN can name it");
        return !valid;
    }
    if (accounts && !has_account(accounts, name))
        remark = "  no account has it";
    done = summarize_domain(queue, name, list, remark);
    return summarize_undeliverable(queue, name, list) && done;
}

struct domain_list {
    char **list;
    size_t count;
};

static int by_text(const void *left, const void *right)
{
    return strcmp(*(char *const *)left, *(char *const *)right);
}

static bool add_domain(void *context, int queue, const char *domain)
{
    struct domain_list *all = context;
    (void)queue;
    all->list = must_alloc(realloc(all->list, (all->count + 1) * sizeof *all->list));
    all->list[all->count++] = must_alloc(strdup(domain));
    return true;
}

/* Prints the table of queued mail, with every message if `list`, and of all domains if count is 0. Domains that no
 * account has are marked, unless accounts is NULL. Returns an exit code. */
static int show_queue(int queue, char **domains, size_t count, bool list, const struct accounts *accounts)
{
    struct domain_list all = {NULL, 0};
    bool done = true;
    if (count == 0) {
        if (!for_each_name(queue, true, add_domain, &all))
            return EX_OSERR;
        if (all.count > 1)
            qsort(all.list, all.count, sizeof *all.list, by_text);
        domains = all.list;
        count = all.count;
    }
    printf("%-30s %9s %11s  %-19s %5s\n", "domain", "messages", "octets", "oldest", "held");
    for (size_t i = 0; i < count; i++)
        done = show_name(queue, domains[i], list, accounts) && done;
    for (size_t i = 0; i < all.count; i++)
        free(all.list[i]);
    free(all.list);
    return done ? EX_OK : EX_TEMPFAIL;
}

/* ---- account ---- */

/* Reads the first line of a file; a line that does not fit is an error. Returns NULL, or why it is not a secret. */
static const char *read_secret_line(FILE *file, char secret[SECRET_MAX])
{
    size_t n = 0;
    int c;
    while ((c = getc(file)) != EOF && c != '\n' && n < SECRET_MAX - 1)
        secret[n++] = (char)c;
    n -= n > 0 && secret[n - 1] == '\r';
    secret[n] = '\0';
    if (ferror(file))
        return strerror(errno);
    if (n > SECRET_LONGEST)
        return "longer than 1022 octets";
    if (strlen(secret) != n || strchr(secret, '\r') || strncmp(secret, BYTE_ORDER_MARK, 3) == 0)
        return "it has a NUL or CR octet or a byte order mark";
    return n == 0 ? "it is empty" : NULL;
}

/* Reads one line from standard input. On a terminal it shows a prompt, and hides what is typed. */
static void ask_secret(const char *prompt, char secret[SECRET_MAX])
{
    struct termios shown, hidden;
    bool terminal = tcgetattr(STDIN_FILENO, &shown) == 0;
    const char *wrong;
    if (terminal) {
        hidden = shown;
        hidden.c_lflag &= ~(tcflag_t)ECHO;
        tcsetattr(STDIN_FILENO, TCSAFLUSH, &hidden);
        fputs(prompt, stderr);
    }
    wrong = read_secret_line(stdin, secret);
    if (terminal) {
        tcsetattr(STDIN_FILENO, TCSAFLUSH, &shown);
        fputc('\n', stderr);
    }
    if (wrong)
        die(EX_DATAERR, "account: not a secret: %s", wrong);
}

/* RFC 5803's form: a server needs no more than this to check a log-in. It cannot be used to log in. */
static bool print_verifier(const char *secret)
{
    unsigned char salt[16];
    struct scram_keys keys;
    char encoded[3][BASE64_SIZE(32) + 1];
    if (RAND_bytes(salt, sizeof salt) != 1 || !scram_keys(&keys, secret, salt, sizeof salt, SCRAM_ITERATIONS))
        return false;
    base64_encode(encoded[0], salt, sizeof salt);
    base64_encode(encoded[1], keys.stored, sizeof keys.stored);
    base64_encode(encoded[2], keys.server, sizeof keys.server);
    printf(SCRAM_SCHEME "%d,%s,%s,%s\n", SCRAM_ITERATIONS, encoded[0], encoded[1], encoded[2]);
    return true;
}

/* Asks for the secret and prints the line of an accounts file. Returns an exit code. */
static int print_account(const char *name, const char *domains, bool scram)
{
    char secret[SECRET_MAX], again[SECRET_MAX];
    ask_secret("Secret: ", secret);
    if (isatty(STDIN_FILENO))
        ask_secret("Again: ", again);
    if (isatty(STDIN_FILENO) && strcmp(secret, again) != 0)
        die(EX_DATAERR, "account: the two secrets differ");
    if (!scram && strncmp(secret, SCRAM_SCHEME, strlen(SCRAM_SCHEME)) == 0)
        die(EX_DATAERR, "account: a secret that starts with " SCRAM_SCHEME " would be taken for a verifier");
    printf("%s:%s:", name, domains);
    if (!scram)
        printf("%s\n", secret);
    else if (!print_verifier(secret))
        die(EX_SOFTWARE, "account: OpenSSL cannot make a verifier");
    OPENSSL_cleanse(secret, sizeof secret);
    return fflush(stdout) == 0 ? EX_OK : EX_IOERR;
}

/* ==== 15. The demo ===================================================================================
 *
 * A provider, a customer and the line between them are threads of this process. They use real sockets and a scratch
 * queue. The customer's side draws the ladder. */

#define DEMO_TIMEOUT 30
#define DEMO_DELAY 20 /* ms, of the line in each direction */
#define DEMO_DOMAINS "example.org,example.com"
#define DEMO_UNKNOWN_MAILBOX "nobody@example.com"
#define DEMO_WAYS 3 /* ways to send the same mail */

/* What makes a session fail. */
enum demo_fault { NO_FAULT, FAIL_CUT, FAIL_REFUSE, FAIL_LATER, FAIL_LOST_REPLY, FAIL_FOREIGN, FAIL_LOCKED };

/* What the demo shows, and how. */
struct demo {
    bool ways[DEMO_WAYS]; /* plain, with PIPELINING, with CHUNKING */
    bool stepwise, tls;
    enum mechanism mechanism;
    enum demo_fault fault;
};

static const struct {
    const char *sender, *recipient, *other, *content;
} demo_mail[] = {
    {"alice@example.edu", "eva@example.org", NULL,
     "From: Alice <alice@example.edu>\nTo: Eva <eva@example.org>\nSubject: Line starts\n\n"
     "A line that starts with a dot\n.needs another one on its way, where DATA is used (RFC 5321, 4.5.2).\n"},
    {"bob@example.edu", "office@example.com", DEMO_UNKNOWN_MAILBOX,
     "From: Bob <bob@example.edu>\nTo: office@example.com, " DEMO_UNKNOWN_MAILBOX "\nSubject: Another domain\n\n"
     "Of the same customer; and one recipient is not there.\n"},
    {"", "eva@example.org", NULL,
     "From: Mail System <postmaster@example.edu>\nTo: eva@example.org\nSubject: From the null sender\n\n"
     "A notice: its reverse-path is <>, and POP3 would have lost that.\n"},
};

static void demo_fill(int queue, bool with_unknown)
{
    for (size_t i = 0; i < sizeof demo_mail / sizeof *demo_mail; i++) {
        struct delivery d;
        bool done = delivery_open(&d, queue, mailbox_domain(demo_mail[i].recipient));
        if (done) {
            fprintf(d.file, "Return-Path: <%s>\nDelivered-To: %s\n", demo_mail[i].sender, demo_mail[i].recipient);
            if (demo_mail[i].other && with_unknown)
                fprintf(d.file, "Delivered-To: %s\n", demo_mail[i].other);
            fputs(demo_mail[i].content, d.file);
            done = deliveries_store(&d, 1);
        }
        if (!done)
            die(EX_CANTCREAT, "demo: cannot write into the scratch queue: %s", strerror(d.problem));
    }
}

/* The provider's side of one session. */
struct demo_provider {
    struct provider *p;
    unsigned long waits; /* of the sender: round trips of the line in the reversed state */
};

static void *demo_provider_thread(void *argument)
{
    struct demo_provider *side = argument;
    struct provider *p = side->p;
    int fd = accept4(p->sockets[0], NULL, NULL, SOCK_CLOEXEC);
    struct session *s = fd < 0 ? NULL : session_new(fd, PROVIDER, p->timeout, p->name, TRACE_OFF);
    if (!s)
        return NULL;
    s->muted = true;
    s->provider = p;
    s->tls_context = p->tls_context;
    provider_session(s);
    side->waits = s->state == REVERSED ? s->io.waits : 0;
    accounts_release(s->accounts);
    free(s);
    return NULL;
}

static struct accounts *demo_accounts(void)
{
    char line[] = "# the one account\nexample.org:example.org,example.com:a secret\n", why[256];
    FILE *file = must_alloc(fmemopen(line, sizeof line - 1, "r"));
    struct accounts *all = accounts_read(file, "demo", why, sizeof why);
    fclose(file);
    return must_alloc(all);
}

/* For --tls: makes one certificate for both sides, valid for an hour. Returns NULL if OpenSSL fails. */
static X509 *demo_certificate(EVP_PKEY *key)
{
    X509 *certificate = must_alloc(X509_new());
    X509_NAME *name = must_alloc(X509_NAME_new());
    X509_EXTENSION *names;
    X509V3_CTX context;
    bool done;
    X509V3_set_ctx(&context, certificate, certificate, NULL, NULL, 0);
    names = X509V3_EXT_conf_nid(NULL, &context, NID_subject_alt_name, "IP:127.0.0.1,DNS:example.org");
    done = names && X509_set_version(certificate, 2) == 1 &&
           ASN1_INTEGER_set(X509_get_serialNumber(certificate), 1) == 1 &&
           X509_gmtime_adj(X509_getm_notBefore(certificate), 0) &&
           X509_gmtime_adj(X509_getm_notAfter(certificate), 3600) &&
           X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC, (const unsigned char *)"odmr demo", -1, -1, 0) == 1 &&
           X509_set_subject_name(certificate, name) == 1 && X509_set_issuer_name(certificate, name) == 1 &&
           X509_set_pubkey(certificate, key) == 1 &&
           X509_add_ext(certificate, names, -1) == 1 && X509_sign(certificate, key, EVP_sha256()) > 0;
    X509_EXTENSION_free(names);
    X509_NAME_free(name);
    if (done)
        return certificate;
    X509_free(certificate);
    return NULL;
}

/* Both contexts show that certificate, and both trust it. */
static void demo_tls(struct provider *p, struct customer *c)
{
    char why[256] = "OpenSSL";
    SSL_CTX *contexts[2] = {tls_server_context(NULL, NULL, NULL, why, sizeof why),
                            tls_client_context(NULL, false, NULL, NULL, why, sizeof why)};
    EVP_PKEY *key = EVP_EC_gen("P-256");
    X509 *certificate = key ? demo_certificate(key) : NULL;
    for (int i = 0; i < 2; i++)
        if (!certificate || !contexts[i] || SSL_CTX_use_certificate(contexts[i], certificate) != 1 ||
            SSL_CTX_use_PrivateKey(contexts[i], key) != 1 ||
            X509_STORE_add_cert(SSL_CTX_get_cert_store(contexts[i]), certificate) != 1)
            die(EX_SOFTWARE, "demo: TLS cannot be set up: %s", why);
    SSL_CTX_set_verify(contexts[0], SSL_VERIFY_PEER, let_pass);
    p->tls_context = contexts[0];
    p->client_ca = c->cert = "the demo's";
    c->tls_context = contexts[1];
    X509_free(certificate);
    EVP_PKEY_free(key);
}

static char demo_dir[] = "/tmp/odmr-demo-XXXXXX";
static char *const demo_remover[] = {"/bin/rm", "-rf", "--", demo_dir, NULL};

static void demo_remove(void)
{
    pid_t pid;
    if (start_program(demo_remover, -1, -1, &pid) == 0)
        finish_program(pid, DEMO_TIMEOUT);
}

/* On a signal this program becomes rm, which removes the scratch directory. A signal handler may call execv(). */
static void demo_interrupted(int number)
{
    (void)number;
    execv(demo_remover[0], demo_remover);
    _exit(EX_OSERR);
}

/* Writes the sendmail of the demo, a script that keeps the last notice. */
static void demo_sendmail(const char *path)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0700);
    static const char script[] = "#!/bin/sh\ncat > \"$0.notice\"\n";
    if (fd < 0 || write(fd, script, sizeof script - 1) != (ssize_t)sizeof script - 1)
        die(EX_CANTCREAT, "demo: cannot write %s: %s", path, strerror(errno));
    close(fd);
}

/* The part of the notice that is for a person. */
static void demo_show_notice(const char *sendmail)
{
    char path[128], line[512];
    bool shown = false;
    FILE *file;
    snprintf(path, sizeof path, "%s.notice", sendmail);
    file = fopen(path, "re");
    if (file)
        printf("What bob@example.edu is told of the recipient that was refused:\n\n");
    while (file && fgets(line, sizeof line, file) && strncmp(line, "Content-Type: message", 21) != 0) {
        shown |= strncmp(line, "This is the mail relay", 22) == 0;
        if (shown && strncmp(line, "--", 2) != 0 && *line != '\n')
            printf("  %s", line);
    }
    if (file)
        fclose(file);
}

/* A line for each message. */
static void demo_show(const char *title, int queue)
{
    struct backlog b;
    backlog_read(&b, NULL, queue, DEMO_DOMAINS);
    printf("%s%s\n", title, b.count > 0 ? "" : " nothing");
    for (size_t i = 0; i < b.count; i++) {
        struct message m;
        if (message_open(&m, queue, b.list[i].path, O_RDONLY) == CLAIMED && message_read(&m) == CLAIMED) {
            printf("  from <%s> to", m.sender);
            for (size_t j = 0; j < m.recipients; j++)
                printf("%s <%s>", j > 0 ? "," : "", m.list[j].address);
            putchar('\n');
        }
        message_close(&m);
    }
    backlog_free(&b);
}

/* The line between the two delays what it carries. Without the delay a reply could arrive before the sender looks for
 * it, and the round trips could not be counted. */
struct demo_line {
    const struct provider *p; /* listens at its first socket; the line at the second */
    enum demo_fault fault;    /* of the line: FAIL_CUT and FAIL_LOST_REPLY, in the second message */
    int to_customer, to_provider;
    bool content;             /* the provider sends the octets of a message */
    int messages;             /* of which DATA was seen */
    atomic_bool reply_is_lost; /* applies to the next reply */
};

static bool demo_ends_with(const char *data, size_t len, const char *end)
{
    return len >= strlen(end) && memcmp(data + len - strlen(end), end, strlen(end)) == 0;
}

/* Looks at what the provider sends. True: the line is cut after the first *len octets of it. Each command waits for its
 * reply, so the octets end where a command or a message ends. */
static bool demo_line_cut(struct demo_line *line, const char *data, size_t *len)
{
    if (line->content && line->fault == FAIL_CUT && line->messages == 2) {
        *len /= 2;
        return true;
    }
    if (line->content && demo_ends_with(data, *len, "\r\n.\r\n")) {
        line->content = false;
        atomic_store(&line->reply_is_lost, line->fault == FAIL_LOST_REPLY && line->messages == 2);
    } else if (demo_ends_with(data, *len, "DATA\r\n")) {
        line->content = true;
        line->messages++;
    }
    return false;
}

static void demo_carry(struct demo_line *line, int from, int to)
{
    char data[4096];
    ssize_t got;
    bool cut = false;
    while (!cut && (got = read(from, data, sizeof data)) > 0) {
        size_t len = (size_t)got;
        if (from == line->to_provider)
            cut = demo_line_cut(line, data, &len);
        else if ((cut = atomic_load(&line->reply_is_lost)))
            len = 0;
        poll(NULL, 0, DEMO_DELAY);
        for (size_t gone = 0; gone < len;) {
            ssize_t n = write(to, data + gone, len - gone);
            if (n < 0)
                break;
            gone += (size_t)n;
        }
    }
    shutdown(to, cut ? SHUT_RDWR : SHUT_WR);
    if (cut)
        shutdown(from, SHUT_RDWR);
}

static void *demo_carry_commands(void *argument)
{
    struct demo_line *line = argument;
    demo_carry(line, line->to_customer, line->to_provider);
    return NULL;
}

static void *demo_line_thread(void *argument)
{
    struct demo_line *line = argument;
    char where[96];
    pthread_t other;
    int code;
    line->to_customer = accept4(line->p->sockets[1], NULL, NULL, SOCK_CLOEXEC);
    if (line->to_customer < 0)
        return NULL;
    name_of_socket(line->p->sockets[0], where, sizeof where);
    line->to_provider = connect_to(where, NULL, DEMO_TIMEOUT, &code);
    if (line->to_provider >= 0 && pthread_create(&other, NULL, demo_carry_commands, line) == 0) {
        demo_carry(line, line->to_provider, line->to_customer);
        pthread_join(other, NULL);
    }
    close(line->to_customer);
    if (line->to_provider >= 0)
        close(line->to_provider);
    return NULL;
}

/* Runs and draws one session. Returns the customer's exit code. *waits: how often the sender waited. */
static int demo_session(struct provider *p, struct customer *c, enum demo_fault fault, unsigned long *waits)
{
    struct demo_provider side = {p, 0};
    struct demo_line line = {.p = p, .fault = fault};
    char where[96];
    pthread_t provider_thread, line_thread;
    int code;
    for (int i = 0; i < 2; i++) {
        listen_on(p, "127.0.0.1:0", false);
        fcntl(p->sockets[i], F_SETFL, 0);
    }
    name_of_socket(p->sockets[1], where, sizeof where);
    c->provider = where;
    fflush(stdout);
    if (pthread_create(&provider_thread, NULL, demo_provider_thread, &side) != 0 ||
        pthread_create(&line_thread, NULL, demo_line_thread, &line) != 0)
        die(EX_OSERR, "demo: cannot start a thread");
    code = customer_session(c);
    shutdown(p->sockets[1], SHUT_RDWR); /* if the customer could not connect, accept4() ends now */
    pthread_join(line_thread, NULL);
    shutdown(p->sockets[0], SHUT_RDWR);
    pthread_join(provider_thread, NULL);
    for (int i = 0; i < 2; i++)
        close(p->sockets[i]);
    p->socket_count = 0;
    c->provider = NULL;
    *waits = side.waits;
    return code;
}

/* The same mail, sent in each of the three ways that a customer's offer allows. */
static const struct {
    enum offer offer;
    const char *title, *row;
} demo_ways[] = {
    {OFFER_SIZE, "The session of RFC 2645, section 6: one command, one reply", "one command, one reply"},
    {OFFER_PIPELINING, "With PIPELINING (RFC 2920): commands leave together", "PIPELINING"},
    {OFFER_ALL, "With CHUNKING too (RFC 3030): no message waits for a reply", "PIPELINING and CHUNKING"},
};
_Static_assert(sizeof demo_ways / sizeof *demo_ways == DEMO_WAYS, "one row a way");

/* A provider with mail and its customer, each with an empty directory of its own; number is part of their names. */
static void demo_begin(const struct demo *d, int number, struct provider *p, struct customer *c)
{
    static char sendmail[64];
    char path[64];
    int timeout = d->stepwise ? TIMEOUT_MAX : DEMO_TIMEOUT;
    *p = (struct provider){.name = "example.net", .login_timeout = timeout, .timeout = timeout, .wake_fd = -1,
                           .sendmail = sendmail};
    *c = (struct customer){.user = "example.org", .secret = "a secret", .name = "example.org", .timeout = timeout,
                           .domains = DEMO_DOMAINS, .trace = TRACE_LADDER, .mechanism = d->mechanism,
                           .stepwise = d->stepwise, .quiet = true, .unknown_mailbox = DEMO_UNKNOWN_MAILBOX};
    pthread_mutex_init(&p->lock, NULL);
    snprintf(path, sizeof path, "%s/queue%d", demo_dir, number);
    p->queue = open_queue(path, true);
    snprintf(path, sizeof path, "%s/mail%d", demo_dir, number);
    c->queue = open_queue(path, true);
    snprintf(sendmail, sizeof sendmail, "%s/sendmail%d", demo_dir, number);
    demo_sendmail(sendmail);
    demo_fill(p->queue, d->fault == NO_FAULT);
    p->accounts = demo_accounts();
    if (d->tls)
        demo_tls(p, c);
}

static void demo_end(struct provider *p, struct customer *c)
{
    accounts_release(p->accounts);
    SSL_CTX_free(p->tls_context);
    SSL_CTX_free(c->tls_context);
    close(p->queue);
    close(c->queue);
}

/* Shows one way; only the first one is shown in full. */
static int demo_way(const struct demo *d, int way, bool first, unsigned long *waits)
{
    struct provider p;
    struct customer c;
    int code;
    demo_begin(d, way, &p, &c);
    c.offer = demo_ways[way].offer;
    ladder_from_reversal = !first;
    printf("%s%s\n\n", first ? "" : "\n\n", demo_ways[way].title);
    demo_show("What the provider holds for its customer:", p.queue);
    if (!first)
        printf("\nThe first two states are as above.\n");
    code = demo_session(&p, &c, NO_FAULT, waits);
    putchar('\n');
    demo_show("What the provider holds now:", p.queue);
    demo_show("What the customer has now:", c.queue);
    printf("The customer waited %lu time%s before the roles turned, the sender %lu time%s after.\n", ladder_waits,
           plural(ladder_waits), *waits, plural(*waits));
    if (first) {
        putchar('\n');
        demo_show_notice(p.sendmail);
    }
    demo_end(&p, &c);
    return code;
}

/* Shows each of the ways that the options select. */
static int demo_each_way(const struct demo *d)
{
    unsigned long waits[DEMO_WAYS] = {0};
    int code = EX_OK, shown = 0;
    for (int way = 0; way < DEMO_WAYS && code == EX_OK; way++)
        if (d->ways[way])
            code = demo_way(d, way, shown++ == 0, &waits[way]);
    if (shown > 1) {
        printf("\nRound trips of the line for the same mail, after the roles turned:\n");
        for (int way = 0; way < DEMO_WAYS; way++)
            if (d->ways[way])
                printf("  %-25s %3lu\n", demo_ways[way].row, waits[way]);
    }
    return code;
}

/* ---- The demo: sessions that fail ---- */

/* One row for each fault: its name for --fail, what happens, what that means, and the customer's exit code. */
static const struct demo_failure {
    const char *name, *title, *meaning;
    int code;
    bool from_start; /* the ladder shows the first two states, too */
} demo_failures[] = {
    [FAIL_CUT] = {"cut", "The line is cut in the middle of the second message",
                  "The provider has no reply to the end of that message, so it keeps the message.\n"
                  "The customer throws away the part that it has.", EX_TEMPFAIL, false},
    [FAIL_REFUSE] = {"refuse", "The customer refuses a recipient for good, with 550",
                     "A 5xx reply is final: the message leaves the queue once its sender was told.\n", EX_OK, false},
    [FAIL_LATER] = {"later", "The customer cannot store a message now: a file is where example.com belongs",
                    "A 4xx reply defers the message: it stays queued, and the others are sent.", EX_CANTCREAT, false},
    [FAIL_LOST_REPLY] = {"lost-reply", "The line is cut when the customer has said that it stored the second message",
                         "The provider cannot know that the customer has it, so it sends it again.\n"
                         "It arrives twice: that is the price of never losing a message.", EX_TEMPFAIL, false},
    [FAIL_FOREIGN] = {"foreign", "ATRN names a domain that is not the account's, example.edu",
                      "One domain without access rejects the whole command (5.2.1-e).", EX_TEMPFAIL, true},
    [FAIL_LOCKED] = {"locked", "Another session of this account has claimed all the mail",
                     "Mail waits, but another session sends it. The customer tries again later.", EX_TEMPFAIL, true},
};

/* Returns NO_FAULT if no fault has that name. */
static enum demo_fault demo_fault_named(const char *name)
{
    for (int i = FAIL_CUT; i < (int)(sizeof demo_failures / sizeof *demo_failures); i++)
        if (strcmp(demo_failures[i].name, name) == 0)
            return (enum demo_fault)i;
    return NO_FAULT;
}

/* FAIL_LOCKED: claims all messages, as another session does. */
static void demo_claim_all(int queue, struct message *list, size_t room)
{
    struct backlog b;
    backlog_read(&b, NULL, queue, DEMO_DOMAINS);
    for (size_t i = 0; i < b.count && i < room; i++)
        message_claim(&list[i], queue, b.list[i].path);
    backlog_free(&b);
}

/* The session with its fault, and the next one without it. */
static int demo_failing(const struct demo *d)
{
    const struct demo_failure *failure = &demo_failures[d->fault];
    struct message claimed[sizeof demo_mail / sizeof *demo_mail] = {0};
    size_t count = sizeof claimed / sizeof *claimed;
    struct provider p;
    struct customer c;
    unsigned long waits;
    int code, file = -1;
    demo_begin(d, 0, &p, &c);
    c.offer = OFFER_SIZE;
    c.unknown_mailbox = d->fault == FAIL_REFUSE ? "office@example.com" : NULL;
    if (d->fault == FAIL_FOREIGN)
        c.domains = "example.org,example.edu";
    if (d->fault == FAIL_LATER && (file = openat(c.queue, "example.com", O_CREAT | O_CLOEXEC, 0600)) < 0)
        die(EX_CANTCREAT, "demo: cannot write into the scratch directory: %s", strerror(errno));
    if (d->fault == FAIL_LOCKED)
        demo_claim_all(p.queue, claimed, count);

    printf("%s\n\n", failure->title);
    demo_show("What the provider holds for its customer:", p.queue);
    ladder_from_reversal = !failure->from_start;
    code = demo_session(&p, &c, d->fault, &waits);
    if (file >= 0 && close(file) == 0)
        unlinkat(c.queue, "example.com", 0);
    printf("\nThe customer's exit code: %d\n", code);
    demo_show("What the provider holds now:", p.queue);
    demo_show("What the customer has now:", c.queue);
    printf("\n%s\n", failure->meaning);
    demo_show_notice(p.sendmail);

    if (d->fault == FAIL_LOCKED)
        for (size_t i = 0; i < count; i++)
            message_close(&claimed[i]);
    c.domains = DEMO_DOMAINS;
    c.trace = TRACE_OFF;
    if (d->fault != FAIL_REFUSE) {
        demo_session(&p, &c, NO_FAULT, &waits);
        printf("\nAfter the next session, without the fault:\n");
        demo_show("What the provider holds then:", p.queue);
        demo_show("What the customer has then:", c.queue);
    }
    demo_end(&p, &c);
    return code == failure->code ? EX_OK : EX_SOFTWARE;
}

/* Runs sessions of this program with itself, and explains them on standard output. Returns an exit code. */
static int demo(const struct demo *d)
{
    int code;
    if (!mkdtemp(demo_dir))
        die(EX_CANTCREAT, "demo: cannot make a scratch directory in /tmp: %s", strerror(errno));
    signal(SIGINT, demo_interrupted);
    if (signal(SIGHUP, demo_interrupted) == SIG_IGN)
        signal(SIGHUP, SIG_IGN); /* nohup */
    signal(SIGTERM, demo_interrupted);
    ladder_file = stdout;
    setvbuf(stdout, NULL, _IOLBF, 0); /* in order with the log on standard error */
    code = d->fault ? demo_failing(d) : demo_each_way(d);
    demo_remove();
    return code;
}

/* ==== 15. Options and main =========================================================================== */

#define ODMR_VERSION "0.1"
#define POLL_MOST 3600           /* seconds: the longest pause of --poll after a failed log-in */
#define MAX_AGE_MOST 36500       /* days */
#define QUEUE_DIR "/var/spool/odmr"
#define OPTIONS_MAX 32
#define FIRST_LONG 256 /* what getopt_long() returns for the first row of a table, above every letter */

/* A command, as odmr --help and its own --help show it. */
struct command {
    const char *name, *arguments, *summary;
    int (*run)(const struct command *c, int argc, char **argv);
    const char *ending; /* of its --help */
};

/* An option of a command: how it is written, how --help explains it, and what is done with its value. */
struct choice {
    const char *name;
    char letter;          /* 0: none */
    const char *argument; /* NULL: none; in brackets: it may be left out */
    const char *text;
    void (*take)(const struct choice *o, const char *value);
    void *where;
    long lowest, highest; /* of a number */
};
#define OTHER(take, where) take, &(where), 0, 0
#define FLAG(where) OTHER(take_flag, where)
#define TEXT(where) OTHER(take_text, where)
#define NUMBER(where, lowest, highest) take_number, &(where), lowest, highest

static void finish_help(void)
{
    exit(fflush(stdout) == 0 ? EX_OK : EX_IOERR);
}

static int label(char *out, size_t size, const struct choice *o)
{
    const char *argument = o->argument ? o->argument : "", *blank = *argument && *argument != '[' ? " " : "";
    char letter[] = {'-', o->letter, ',', '\0'};
    return snprintf(out, size, "  %3s --%s%s%s", o->letter ? letter : "", o->name, blank, argument);
}

static void show_help(const struct command *c, const struct choice *options)
{
    char left[80];
    int width = 0;

    printf("odmr %s %s: %s\n\n", c->name, c->arguments, c->summary);
    for (const struct choice *o = options; o->name; o++)
        width = label(left, sizeof left, o) > width ? label(left, sizeof left, o) : width;
    for (const struct choice *o = options; o->name; o++) {
        label(left, sizeof left, o);
        for (const char *line = o->text; *line; line += strspn(line, "\n")) {
            int len = (int)strcspn(line, "\n");
            printf("%-*s  %.*s\n", width, line == o->text ? left : "", len, line);
            line += len;
        }
    }
    printf("%s", c->ending);
    finish_help();
}

/* Passes each option on the command line to its row, and leaves optind at the first argument. */
static void take_options(const struct command *c, const struct choice *options, int argc, char **argv)
{
    struct option longs[OPTIONS_MAX + 2] = {{"help", no_argument, NULL, 'h'}};
    char letters[2 * OPTIONS_MAX + 3] = ":h";
    size_t used = 2;
    int given, row;

    for (int i = 0; options[i].name; i++) {
        const char *argument = options[i].argument;
        int has = !argument ? no_argument : *argument == '[' ? optional_argument : required_argument;
        longs[i + 1] = (struct option){options[i].name, has, NULL, FIRST_LONG + i};
        if (options[i].letter)
            used += (size_t)snprintf(letters + used, sizeof letters - used, "%c%s", options[i].letter,
                                     has == required_argument ? ":" : "");
    }

    while ((given = getopt_long(argc, argv, letters, longs, NULL)) != -1) {
        if (given == 'h')
            show_help(c, options);
        if (given == ':')
            die(EX_USAGE, "%s: option %s needs a value; see odmr %s --help", c->name, argv[optind - 1], c->name);
        if (given == '?' && optopt > 0 && optopt < FIRST_LONG && !strchr(letters, optopt))
            die(EX_USAGE, "%s: unknown option -%c; see odmr %s --help", c->name, optopt, c->name);
        if (given == '?')
            die(EX_USAGE, "%s: %s %s; see odmr %s --help", c->name, optopt ? "no value belongs to" : "unknown option",
                argv[optind - 1], c->name);
        for (row = 0; given != FIRST_LONG + row && given != options[row].letter;)
            row++;
        options[row].take(&options[row], optarg);
    }
}

static void take_options_only(const struct command *c, const struct choice *options, int argc, char **argv)
{
    take_options(c, options, argc, argv);
    if (optind < argc)
        die(EX_USAGE, "%s: %s: takes options only; see odmr %s --help", c->name, argv[optind], c->name);
}

static void take_flag(const struct choice *o, const char *value)
{
    (void)value;
    *(bool *)o->where = true;
}

static void take_text(const struct choice *o, const char *value)
{
    *(const char **)o->where = value;
}

static void take_number(const struct choice *o, const char *value)
{
    char *end;
    long number;
    errno = 0;
    number = strtol(value, &end, 10);
    if (end == value || *end != '\0' || errno || number < o->lowest || number > o->highest)
        die(EX_USAGE, "--%s %s: not a number from %ld to %ld", o->name, value, o->lowest, o->highest);
    *(int *)o->where = (int)number;
}

/* The name is sent in greetings, so it must not be able to break a line. */
static void take_name(const struct choice *o, const char *value)
{
    if (*value == '\0' || strlen(value) > DOMAIN_MAX || !printable(value, strlen(value)) || strchr(value, ' '))
        die(EX_USAGE, "--name %s: not the name of a host", value);
    take_text(o, value);
}

static void take_trace(const struct choice *o, const char *value)
{
    if (value && strcmp(value, "ladder") != 0)
        die(EX_USAGE, "--trace=%s: there is --trace, and --trace=ladder", value);
    *(enum trace *)o->where = value ? TRACE_LADDER : TRACE_RFC;
}

static void take_demo_fault(const struct choice *o, const char *value)
{
    enum demo_fault fault = demo_fault_named(value);
    if (!fault)
        die(EX_USAGE, "--fail %s: not cut, refuse, later, lost-reply, foreign or locked", value);
    *(enum demo_fault *)o->where = fault;
}

static void take_mechanism(const struct choice *o, const char *value)
{
    enum mechanism m = mechanism_named(value);
    if (m == NO_MECHANISM)
        die(EX_USAGE, "--mechanism %s: not one of ours; see odmr customer --help", value);
    *(enum mechanism *)o->where = m;
}

static void add_listener(struct provider *p, const char *where, bool tls)
{
    p->listen_tls[p->listen_count] = tls;
    p->listen[p->listen_count++] = where;
}

/* --listen, --tls-listen */
static void take_listener(const struct choice *o, const char *value)
{
    struct provider *p = o->where;
    char host[256], port[32];
    if (!split_host_port(value, NULL, host, sizeof host, port, sizeof port))
        die(EX_USAGE, "--%s %s: not ADDR:PORT", o->name, value);
    if (p->listen_count == LISTENERS_MAX)
        die(EX_USAGE, "--%s %s: more than %d of them", o->name, value, LISTENERS_MAX);
    add_listener(p, value, strcmp(o->name, "tls-listen") == 0);
}

static void take_network(const struct choice *o, const char *value)
{
    struct provider *p = o->where;
    if (p->allow_count == NETWORKS_MAX)
        die(EX_USAGE, "--allow %s: more than %d of them", value, NETWORKS_MAX);
    if (!network_parse(&p->allow[p->allow_count++], value))
        die(EX_USAGE, "--allow %s: not ADDR or ADDR/BITS", value);
}

/* The host's name as the system has it, else localhost. */
static const char *host_name(void)
{
    static char name[DOMAIN_MAX + 1];
    if (gethostname(name, sizeof name - 1) < 0 || name[0] == '\0')
        snprintf(name, sizeof name, "localhost");
    return name;
}

/* Checks which options go together, and fills in the defaults that depend on others. */
static void complete_provider(struct provider *p)
{
    bool plain = false, tls = false;
    for (size_t i = 0; i < p->listen_count; i++) {
        plain |= !p->listen_tls[i];
        tls |= p->listen_tls[i];
    }
    if (!p->cert && (p->key || tls || p->client_ca || p->require_tls))
        die(EX_USAGE, "provider: %s needs --cert", p->key ? "--key" : tls ? "--tls-listen" :
                                                   p->client_ca ? "--client-ca" : "--require-tls");
    if (!p->key)
        p->key = p->cert; /* one file may hold both */
    if (!plain && !tls)
        add_listener(p, "*:" ODMR_PORT, false); /* (4-a) */
}

static int main_provider(const struct command *command, int argc, char **argv)
{
    static struct provider p = {.sendmail = "/usr/sbin/sendmail", .queue_path = QUEUE_DIR,
                                .accounts_path = "/etc/odmr/accounts", .max_sessions = 1000, .max_per_address = 20,
                                .timeout = 300, .login_timeout = 60};
    static const struct choice options[] = {
        {"listen", 'l', "ADDR:PORT", "default port 366 on every address; with --tls-listen alone: none;\n"
                                     "may be given again; port 0: a free one; [::1]:3660 for IPv6",
         OTHER(take_listener, p)},
        {"queue", 'q', "DIR", "default " QUEUE_DIR, TEXT(p.queue_path)},
        {"accounts", 'a', "FILE", "default /etc/odmr/accounts", TEXT(p.accounts_path)},
        {"name", 'n', "HOST", "the name in greetings and EHLO; default: the host's name", OTHER(take_name, p.name)},
        {"trace", 't', "[=ladder]", "the whole dialogue on standard error; --trace=ladder draws it",
         OTHER(take_trace, p.trace)},
        {"interval", 'i', "SECONDS", "450 for an ATRN that repeats sooner for the same account; default 0: off",
         NUMBER(p.interval, 0, INT_MAX)},
        {"allow", 0, "ADDR[/BITS]", "serve these addresses only; may be given again", OTHER(take_network, p)},
        {"max-sessions", 0, "N", "default 1000; over it: 421 and close", NUMBER(p.max_sessions, 1, INT_MAX)},
        {"max-per-address", 0, "N", "default 20, an IPv6 /64 being one address; over it: 421 and close",
         NUMBER(p.max_per_address, 1, INT_MAX)},
        {"timeout", 0, "SECONDS", "limit of each wait for the peer, default 300", NUMBER(p.timeout, 1, TIMEOUT_MAX)},
        {"login-timeout", 0, "SECONDS", "from the connection to the log-in, default 60",
         NUMBER(p.login_timeout, 1, TIMEOUT_MAX)},
        {"no-cram-md5", 0, NULL, "do not offer CRAM-MD5 (RFC 2645, 5.1.2: a site may have something better)",
         FLAG(p.no_cram_md5)},
        {"cert", 0, "FILE", "PEM; STARTTLS is offered", TEXT(p.cert)},
        {"key", 0, "FILE", "PEM; default: in the file of --cert", TEXT(p.key)},
        {"tls-listen", 0, "ADDR:PORT", "implicit TLS: from the first octet; may be repeated", OTHER(take_listener, p)},
        {"client-ca", 0, "FILE", "PEM; customers with a certificate it signed may AUTH EXTERNAL", TEXT(p.client_ca)},
        {"require-tls", 0, NULL, "refuse AUTH before TLS, with 538", FLAG(p.require_tls)},
        {"user", 0, "NAME", "after binding, run as this user, who must be able to read the files above",
         TEXT(p.user)},
        {"sendmail", 0, "PATH", "the program for failure notices, default /usr/sbin/sendmail", TEXT(p.sendmail)},
        {"max-age", 0, "DAYS", "return mail that was not collected for so long; default 0: never",
         NUMBER(p.max_age, 0, MAX_AGE_MOST)},
        {0},
    };

    p.name = host_name();
    take_options_only(command, options, argc, argv);
    complete_provider(&p);
    return provider_run(&p);
}

/* The secret is never on the command line. It is the first line of a file, or it is in the environment. There it is
 * removed, so that the program of --exec does not inherit it. */
static void read_secret(struct customer *c, const char *path)
{
    static char secret[SECRET_MAX];
    char *variable = getenv("ODMR_SECRET");
    const char *name = path ? path : "ODMR_SECRET", *wrong;
    struct stat st;
    FILE *file;
    if (!path && !variable && c->cert)
        return; /* the certificate names the customer */
    if (!path && !variable)
        die(EX_USAGE, "customer: no secret: give --secret-file, or the variable ODMR_SECRET");
    if (path)
        file = fopen(path, "re");
    else
        file = must_alloc(*variable ? fmemopen(variable, strlen(variable), "r") : fmemopen("\n", 1, "r"));
    if (!file)
        die(EX_NOINPUT, "cannot open the secret file %s (--secret-file): %s", path, strerror(errno));
    if (path && fstat(fileno(file), &st) == 0 && S_ISREG(st.st_mode)) {
        if (st.st_mode & (S_IWGRP | S_IWOTH))
            die(EX_CONFIG, "%s: others than its owner can write it; do: chmod 600 %s", path, path);
        if (st.st_mode & S_IROTH)
            log_event(NULL, LOG_WARNING, "%s: everybody can read it; do: chmod 600 %s", path, path);
    }
    wrong = read_secret_line(file, secret);
    if (wrong)
        die(secret[0] ? EX_DATAERR : EX_NOINPUT, "customer: the secret in %s: %s", name, wrong);
    fclose(file);
    if (variable)
        OPENSSL_cleanse(variable, strlen(variable)); /* else /proc would still show it */
    unsetenv("ODMR_SECRET");
    c->secret = secret;
}

static const char *join_domains(char **domains, int count)
{
    static char list[ATRN_LINE];
    size_t used = 0;
    for (int i = 0; i < count; i++) {
        if (!domain_list_valid(domains[i]))
            die(EX_USAGE, "customer: %s: not a domain of two labels or more", domains[i]);
        if (used + strlen(domains[i]) + 8 > ATRN_LINE)
            die(EX_USAGE, "customer: more domains than one ATRN can name (%d octets)", ATRN_LINE);
        used += (size_t)snprintf(list + used, ATRN_LINE - used, "%s%s", i ? "," : "", domains[i]);
    }
    return list;
}

/* An error that will not go away ends the polling. After each failed log-in the pause is longer, so that the attempts
 * do not look like an attack. */
static int poll_provider(const struct customer *c, int interval)
{
    struct sigaction stop = {.sa_handler = stop_customer, .sa_flags = (int)SA_RESETHAND};
    struct pollfd told = {.events = POLLIN};
    int pause = interval, code;
    if (interval == 0)
        return customer_session(c);
    if (pipe2(stop_pipe, O_CLOEXEC) < 0)
        die(EX_OSERR, "cannot make a pipe: %s", strerror(errno));
    told.fd = stop_pipe[0];
    sigaction(SIGTERM, &stop, NULL);
    sigaction(SIGINT, &stop, NULL);
    while (!customer_stops) {
        code = customer_session(c);
        if (code == EX_USAGE || code == EX_DATAERR || code == EX_CONFIG)
            return code;
        pause = code != EX_NOPERM ? interval : pause < POLL_MOST / 2 ? pause * 2 : POLL_MOST;
        pause = pause < interval ? interval : pause;
        if (code == EX_NOPERM && !customer_stops)
            log_event(NULL, LOG_WARNING, "authentication failed; the next attempt is in %d seconds", pause);
        poll(&told, 1, pause * 1000);
    }
    return EX_OK;
}

/* Checks which options go together, fills in the defaults, and does all that can fail without the provider. */
static void complete_customer(struct customer *c, const char *queue, const char *secret_file)
{
    char why[PATH_MAX + 256];
    if (c->user ? *c->user == '\0' || strlen(c->user) >= MAILBOX_MAX : !c->cert)
        die(EX_USAGE, "customer: --user NAME is missing; see odmr customer --help");
    if ((c->smtp != NULL) + (c->exec != NULL) + (queue != NULL) > 1)
        die(EX_USAGE, "customer: only one of --queue, --smtp and --exec");
    if (c->key && !c->cert)
        die(EX_USAGE, "customer: --key needs --cert");
    if (c->ca && c->insecure)
        die(EX_USAGE, "customer: only one of --ca and --insecure");
    if (!c->key)
        c->key = c->cert;
    read_secret(c, secret_file);
    if (c->secret && !c->user)
        die(EX_USAGE, "customer: --user NAME is missing; see odmr customer --help");
    c->tls_context = tls_client_context(c->ca, c->insecure, c->cert, c->key, why, sizeof why);
    if (!c->tls_context)
        die(EX_CONFIG, "customer: %s", why);
    if (!c->smtp && !c->exec) {
        queue = queue ? queue : "./mail";
        c->queue = open_queue(queue, true);
        if (c->queue < 0)
            die(EX_CANTCREAT, "cannot write to the queue directory %s (--queue): %s; no ATRN is sent", queue,
                strerror(errno));
        if (geteuid() == 0)
            become_owner(c->queue, queue);
    }
}

static int main_customer(const struct command *command, int argc, char **argv)
{
    static struct customer c = {.timeout = 300, .queue = -1};
    static const char *queue, *secret_file;
    static int interval;
    static const struct choice options[] = {
        {"user", 'u', "NAME", "the account's name", TEXT(c.user)},
        {"secret-file", 's', "FILE", "its secret is the first line; or the variable ODMR_SECRET", TEXT(secret_file)},
        {"queue", 'q', "DIR", "deliver into DIR/<domain>/new; default ./mail", TEXT(queue)},
        {"smtp", 0, "HOST:PORT", "or connect the reversed session to this SMTP server", TEXT(c.smtp)},
        {"exec", 0, "COMMAND", "or to this program's standard input and output (\"sendmail -bs\")", TEXT(c.exec)},
        {"name", 'n', "HOST", "the name in greetings and EHLO; default: the host's name", OTHER(take_name, c.name)},
        {"trace", 't', "[=ladder]", "the whole dialogue on standard error; --trace=ladder draws it",
         OTHER(take_trace, c.trace)},
        {"timeout", 0, "SECONDS", "limit of each wait for the peer, default 300", NUMBER(c.timeout, 1, TIMEOUT_MAX)},
        {"tls", 0, NULL, "implicit TLS, from the first octet; else STARTTLS is used if offered", FLAG(c.tls)},
        {"require-tls", 0, NULL, "end the session if STARTTLS is not offered", FLAG(c.require_tls)},
        {"ca", 0, "FILE", "trust these certificates instead of the system's", TEXT(c.ca)},
        {"insecure", 0, NULL, "do not verify the provider's certificate", FLAG(c.insecure)},
        {"cert", 0, "FILE", "PEM; the customer's own certificate, for AUTH EXTERNAL", TEXT(c.cert)},
        {"key", 0, "FILE", "PEM; default: in the file of --cert", TEXT(c.key)},
        {"mechanism", 0, "NAME", "this SASL mechanism and no other: SCRAM-SHA-256-PLUS, SCRAM-SHA-256,\n"
                                 "EXTERNAL, CRAM-MD5, PLAIN; default: the first that both sides support, and\n"
                                 "EXTERNAL only without a secret",
         OTHER(take_mechanism, c.mechanism)},
        {"quiet", 0, NULL, "no progress and no summary, only errors", FLAG(c.quiet)},
        {"poll", 0, "SECONDS", "ask again and again; after exit code 77 less and less often, up to an hour",
         NUMBER(interval, 1, TIMEOUT_MAX)},
        {0},
    };
    int code;

    c.name = host_name();
    take_options(command, options, argc, argv);
    if (optind == argc)
        die(EX_USAGE, "customer: which provider? HOST[:PORT] is missing; see odmr customer --help");
    c.provider = argv[optind++];
    c.domains = join_domains(argv + optind, argc - optind);
    complete_customer(&c, queue, secret_file);
    code = poll_provider(&c, interval);
    SSL_CTX_free(c.tls_context);
    return code;
}

static int main_enqueue(const struct command *command, int argc, char **argv)
{
    static const char *path = QUEUE_DIR, *sender = "";
    static const struct choice options[] = {
        {"queue", 'q', "DIR", "default " QUEUE_DIR, TEXT(path)},
        {"from", 'f', "SENDER", "the reverse-path; default: the null sender", TEXT(sender)},
        {0},
    };
    int queue;

    take_options(command, options, argc, argv);
    if (optind == argc)
        die(EX_USAGE, "enqueue: no RECIPIENT; see odmr enqueue --help");
    if (strcmp(sender, "<>") == 0)
        sender = "";
    if (!sender_valid(sender))
        die(EX_DATAERR, "enqueue: -f %s: not a mailbox", sender);
    if (argc - optind > ENVELOPE_RECIPIENTS_MAX)
        die(EX_DATAERR, "enqueue: more than %d recipients; nothing is queued", ENVELOPE_RECIPIENTS_MAX);
    for (int i = optind; i < argc; i++) {
        const char *domain = mailbox_domain(argv[i]);
        if (!recipient_valid(argv[i]) || !domain_valid(domain, strlen(domain)))
            die(EX_DATAERR, "enqueue: %s: not a mailbox; nothing is queued", argv[i]);
    }
    queue = open_queue(path, false);
    if (queue < 0)
        die(EX_TEMPFAIL, "enqueue: cannot open the queue directory %s (--queue): %s; try again later", path,
            strerror(errno));
    become_owner(queue, path);
    return enqueue(queue, sender, host_name(), argv + optind, argc - optind);
}

static int main_queue(const struct command *command, int argc, char **argv)
{
    static const char *path = QUEUE_DIR, *accounts_path;
    static bool list;
    static const struct choice options[] = {
        {"queue", 'q', "DIR", "default " QUEUE_DIR, TEXT(path)},
        {"list", 'l', NULL, "every message with its envelope, and why it is held if it is", FLAG(list)},
        {"accounts", 'a', "FILE", "mark domains that no account has: nobody can collect their mail",
         TEXT(accounts_path)},
        {0},
    };
    char why[PATH_MAX + 256];
    struct accounts *accounts = NULL;
    int queue, code;

    take_options(command, options, argc, argv);
    for (int i = optind; i < argc; i++) {
        if (!domain_valid(argv[i], strlen(argv[i])))
            die(EX_USAGE, "queue: %s: not a domain", argv[i]);
        lower_case(argv[i]); /* as the directories are */
    }
    queue = open_queue(path, false);
    if (queue < 0)
        die(EX_NOINPUT, "queue: cannot open the queue directory %s (--queue): %s", path, strerror(errno));
    if (accounts_path && !(accounts = accounts_load(accounts_path, why, sizeof why)))
        die(EX_CONFIG, "queue: %s", why);
    code = show_queue(queue, argv + optind, (size_t)(argc - optind), list, accounts);
    if (fflush(stdout) != 0 || ferror(stdout))
        die(EX_IOERR, "queue: cannot write the table: %s", strerror(errno));
    accounts_release(accounts);
    return code;
}

static int main_account(const struct command *command, int argc, char **argv)
{
    static bool scram;
    static const struct choice options[] = {
        {"scram", 0, NULL, "a verifier instead of the secret: it can check SCRAM-SHA-256 and PLAIN",
         FLAG(scram)},
        {0},
    };
    const char *name;

    take_options(command, options, argc, argv);
    if (argc - optind != 2)
        die(EX_USAGE, "account: NAME and DOMAIN[,DOMAIN...] are needed; see odmr account --help");
    name = argv[optind];
    if (name[0] == '\0' || name[0] == '#' || strpbrk(name, ":\r\n") || strlen(name) >= MAILBOX_MAX)
        die(EX_USAGE, "account: %s: not a name: it is empty, too long, starts with # or has a colon", name);
    if (!domain_list_valid(argv[optind + 1]))
        die(EX_USAGE, "account: %s: not domains of two labels or more, with commas between", argv[optind + 1]);
    return print_account(name, argv[optind + 1], scram);
}

static int main_demo(const struct command *command, int argc, char **argv)
{
    static struct demo d = {.mechanism = CRAM_MD5}; /* the RFC's own */
    static const struct choice options[] = {
        {"plain", 0, NULL, "only the RFC's own session: one command, one reply", FLAG(d.ways[0])},
        {"pipelining", 0, NULL, "only the session with PIPELINING", FLAG(d.ways[1])},
        {"chunking", 0, NULL, "only the session with CHUNKING", FLAG(d.ways[2])},
        {"fail", 0, "HOW", "a session that fails, and the queue before and after; HOW is\n"
                           "cut, refuse, later, lost-reply, foreign or locked",
         OTHER(take_demo_fault, d.fault)},
        {"step", 0, NULL, "explain each command beforehand, and wait for Return, or q to quit", FLAG(d.stepwise)},
        {"tls", 0, NULL, "with STARTTLS", FLAG(d.tls)},
        {"mechanism", 0, "NAME", "log in by this one; default CRAM-MD5, the RFC's own",
         OTHER(take_mechanism, d.mechanism)},
        {0},
    };

    take_options_only(command, options, argc, argv);
    if (!d.tls && d.mechanism != CRAM_MD5 && d.mechanism != SCRAM)
        die(EX_USAGE, "demo: --mechanism %s needs --tls", mechanism_name(d.mechanism));
    if (d.fault && (d.tls || d.ways[0] || d.ways[1] || d.ways[2]))
        die(EX_USAGE, "demo: --fail goes with no other option than --step and --mechanism");
    if (!d.ways[0] && !d.ways[1] && !d.ways[2])
        d.ways[0] = d.ways[1] = d.ways[2] = true;
    return demo(&d);
}

static const struct command commands[] = {
    {"provider", "[options]", "queue mail in Maildirs, send it on ATRN", main_provider,
     "\nExample:\n"
     "  odmr provider --name relay.example.net --user odmr --cert /etc/odmr/cert.pem --key /etc/odmr/key.pem\n"
     "\nExit: 0 stopped by a signal; 64 wrong usage; 67 no such --user; 68 unknown host in --listen;\n"
     "71 cannot listen; 77 may not become --user; 78 the accounts, the certificates or the queue cannot be used.\n"
     "\nSignals: SIGHUP reads accounts and certificates again; SIGUSR1 logs a line for each session;\n"
     "SIGTERM and SIGINT finish the messages under way and stop, a second one stops at once.\n"
     "\nFiles: /etc/odmr/accounts, see odmr-accounts(5); /var/spool/odmr, see odmr-queue(5).\n"},
    {"customer", "[options] HOST[:PORT] [DOMAIN...]", "fetch the mail of these domains, or of all", main_customer,
     "\nExample:\n"
     "  odmr customer --user example.org --secret-file secret --require-tls odmr.example.net example.org\n"
     "\nExit: 0 mail received; 1 no mail, or none that was accepted; 64 wrong usage; 65 the secret is not valid;\n"
     "66 the secret cannot be read; 68 unknown host; 69 no ATRN or no such service; 73 the mail cannot be written;\n"
     "75 try later; 76 the peer broke the protocol; 77 not authenticated, or the certificate is not trusted;\n"
     "78 a certificate or the secret file cannot be used.\n"
     "\nSignals: with --poll, SIGTERM and SIGINT finish the message under way and exit with 0.\n"
     "\nFiles: ./mail has the form of the provider's queue, see odmr-queue(5). The secret is the first line of\n"
     "--secret-file, or the variable ODMR_SECRET.\n"},
    {"enqueue", "[options] [--] RECIPIENT...", "put the message on standard input into the queue", main_enqueue,
     "\nExample:\n"
     "  odmr enqueue --from ned@example.edu eva@example.org < message\n"
     "\nExit: 0 queued; 64 wrong usage; 65 a bad address, or more than 100,000 recipients; 75 try later.\n"
     "After 65 and 75 nothing is queued.\n"
     "\nFiles: /var/spool/odmr/DOMAIN/new, see odmr-queue(5).\n"},
    {"queue", "[options] [DOMAIN...]", "show what waits: domain, messages, octets, oldest, held", main_queue,
     "\nWithout a DOMAIN it also shows what is in the directory and is not a domain.\n"
     "\nExample:\n"
     "  odmr queue --list --accounts /etc/odmr/accounts\n"
     "\nExit: 0 shown; 64 wrong usage; 66 no such directory; 74 the output cannot be written;\n"
     "75 something cannot be read.\n"
     "\nFiles: /var/spool/odmr, see odmr-queue(5).\n"},
    {"account", "[--scram] NAME DOMAIN[,DOMAIN...]", "print a line for the accounts file", main_account,
     "\nThe secret comes from the terminal or from standard input. Names and secrets are UTF-8 and are not changed.\n"
     "\nExample:\n"
     "  odmr account --scram example.org example.org,example.com >> /etc/odmr/accounts\n"
     "\nExit: 0 printed; 64 wrong usage; 65 not a secret.\n"
     "\nFiles: /etc/odmr/accounts, see odmr-accounts(5). Then send SIGHUP to the provider.\n"},
    {"demo", "[options]", "whole sessions on this machine, explained", main_demo,
     "\nExample:\n"
     "  odmr demo --fail cut --step\n"
     "\nExit: 0 shown; 64 wrong usage; 73 the scratch directory cannot be written.\n"
     "\nFiles: a scratch directory in /tmp, which is removed.\n"},
    {0},
};

static void list_commands(void)
{
    puts("odmr: On-Demand Mail Relay (RFC 2645)\n");
    for (const struct command *c = commands; c->name; c++)
        printf("  odmr %-8s %-34s %s\n", c->name, c->arguments, c->summary);
    puts("\nodmr COMMAND --help explains each. odmr --version tells the version.");
    finish_help();
}

/* Sets the signals as this program needs them, whatever the parent process has left. If SIGCHLD were ignored,
 * waitpid(2) would lose the exit code of sendmail. If SIGTERM were blocked, nothing could be stopped. A lost reader and
 * a file at its size limit are errors of write(2). If SIGHUP, SIGINT or SIGQUIT is ignored, it stays so, because
 * nohup and a shell's & need that. */
static void set_signals(void)
{
    static const int plain[] = {SIGCHLD, SIGTERM, SIGALRM, SIGUSR1, SIGUSR2};
    sigset_t none;
    for (size_t i = 0; i < sizeof plain / sizeof *plain; i++)
        signal(plain[i], SIG_DFL);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
}

/* If standard error is closed, the first connection would get its descriptor, and the log would be written there. So
 * /dev/null is opened for each closed stream, in the wrong mode: reading or writing it fails as before. */
static void reserve_standard_streams(void)
{
    for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++)
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", fd == STDIN_FILENO ? O_WRONLY : O_RDONLY) != fd)
            exit(EX_OSERR);
}

int main(int argc, char **argv)
{
    reserve_standard_streams();
    if (argc < 2)
        die(EX_USAGE, "no command; see odmr --help");
    if (argc > 2 && strcmp(argv[1], "help") == 0)
        argv[1] = argv[2], argv[2] = "--help";
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 || strcmp(argv[1], "help") == 0)
        list_commands();
    if (strcmp(argv[1], "--version") == 0) {
        puts("odmr " ODMR_VERSION);
        finish_help();
    }
    opterr = 0;
    set_signals();
    for (const struct command *c = commands; c->name; c++)
        if (strcmp(argv[1], c->name) == 0)
            return c->run(c, argc - 1, argv + 1);
    die(EX_USAGE, "%s: no such command; see odmr --help", argv[1]);
}
