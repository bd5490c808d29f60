/* odmr.h: the map of odmr.c. Its parts, each with the functions where reading starts:
 *
 *    1  the provider's session, its three states                     provider_session
 *    2  the provider's commands: EHLO, STARTTLS, AUTH, ATRN, QUIT    atrn_command
 *    3  the provider as the client sends the queued mail             send_mail
 *    4  the customer as the client, from the greeting to ATRN        client_dialogue
 *    5  the customer as the server; answers that wait for the disk   receive_mail; answer, answer_when_stored
 *    6  SASL: each mechanism with its two halves                     sasl_serve, sasl_prove
 *    7  failure notices; the fates of recipients go into the queue   update_queue
 *    8  the queue: envelope, message, claim, delivery                message_claim, deliveries_store
 *    9  the session handed on to another mail server                 hand_session_on
 *   10  accounts                                                     accounts_load
 *   11  lines and replies; addresses and domains                     command, reply, read_reply; recipient_valid
 *   12  the stream: octets with or without TLS, time-outs            stream_read_line, stream_flush
 *   13  log, trace, ladder; the programs that are run                log_event, trace_line; start_program
 *   14  the caretaker; the listener: threads, signals, shutdown      caretaker; provider_run
 *   15  tools, demo, options                                         main
 *
 * This file has the constants, types and functions that more than one part uses. All others are in their part. A static
 * function is also in its part if only later parts use it, too. */

#ifndef ODMR_H
#define ODMR_H

#ifndef __LP64__ /* 32 bits: for messages over 2 GiB and times after 2038. On 64 bits they would only rename calls */
#define _FILE_OFFSET_BITS 64
#define _TIME_BITS 64
#endif
#define _GNU_SOURCE /* accept4, flock, initgroups, ppoll, strcasestr, strverscmp; the rest is C11 and POSIX.1-2008 */

#include <openssl/evp.h>
#include <openssl/ssl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <time.h>

/* ---- Constants ---- */

#define ODMR_PORT "366"          /* 4-a: reserved for On-Demand Mail Relay */
#define COMMAND_LINE 512         /* RFC 5321, 4.5.3.1.4: octets with CRLF */
#define ATRN_LINE 8192           /* our own limit, because ATRN may name many domains */
#define AUTH_LINE 12288          /* RFC 4954, 4 */
#define IDLE_COMMANDS 100        /* in a row without ATRN or mail; after them either side says 421 */
#define DOMAIN_MAX 255           /* RFC 5321, 4.5.3.1.2 */
#define MAILBOX_MAX 320          /* 64 + @ + 255 (RFC 5321, 4.5.3.1) */
#define MESSAGE_ID_MAX 256       /* octets of a Message-ID in the log */
#define RECEIVE_BUFFER 212992    /* octets: the most that Linux grants by default (net.core.rmem_max) */
#define STREAM_IN 16384
#define STREAM_OUT 131072
#define COPY_SIZE 131072
#define LONE_DOT 3               /* octets: the dot and CRLF that end the content of DATA */
#define ENVELOPE_RECIPIENTS_MAX 100000 /* in a file of the queue, or in one enqueue; each needs 100 octets of memory */
#define WIRE_PART 4096           /* octets of content converted at once; the wire form has at most twice as many */
#define LOG_LINE 2048            /* octets; longer lines of the log are cut */
#define SALT_MAX 64
#define SCRAM_SCHEME "{SCRAM-SHA-256}"
#define SCRAM_ITERATIONS 4096    /* RFC 7677, 4: the minimum; for new verifiers, and if no account has one */
#define SECRET_MAX 1024          /* octets of a secret with its line end */
#define BYTE_ORDER_MARK "\xef\xbb\xbf" /* UTF-8's; some editors write it */
#define LISTENERS_MAX 32
#define NETWORKS_MAX 64
#define NAME_SIZE 128            /* octets of the name that we give a file in a Maildir */
#define UNDELIVERABLE ".Undeliverable" /* a Maildir++ folder */
#define MAILDIR_PATH (DOMAIN_MAX + 32) /* octets: a domain's Maildir or a folder in it, box included */
#define REPLY_KEPT 2048          /* octets of the text of a reply; the rest is dropped */
#define REFUSAL_SIZE 512         /* octets of a reply in a failure notice */
#define NOTICE_TIMEOUT 60        /* seconds for sendmail to accept a notice */
#define BASE64_SIZE(n) (((n) + 2) / 3 * 4)

/* ---- Types ---- */

/* What a session does after a command. */
enum next { STAY, GO_ON, END }; /* stay in this state; go on to the next state; end */

/* The result of opening or claiming a message, or of looking for the mail of a request. */
enum claim {
    CLAIMED, /* the message is claimed or, if it was only opened, can be read */
    BUSY,    /* another session has claimed the message, or it cannot be read now */
    HELD,    /* the message is never sent; message.held says why */
    NOTHING, /* there is no mail, or the message is gone */
};

/* The result of a change to a message's file. */
enum update {
    UPDATED,
    REPLACED, /* no change: the name now leads to another file, or another program has written into the file */
    FAILED,   /* message.problem says why */
};

enum side { PROVIDER, CUSTOMER };

/* The states of section 5. QUIT ends each of them; only AUTH leads to the second, only ATRN to the third (5-a). */
enum state { INITIAL, AUTHENTICATED, REVERSED };

/* Section 7: the reply codes of RFC 2645. All others are SMTP's.
 *   250 done            450 ATRN request refused           451 unable to process ATRN now
 *   453 no mail         502 command not implemented        530 authentication required */

enum trace { TRACE_OFF, TRACE_RFC, TRACE_LADDER };

/* The mechanisms of AUTH (5.1.2-a, 5.1.2-d). */
enum mechanism { NO_MECHANISM, CRAM_MD5, SCRAM, SCRAM_PLUS, EXTERNAL, PLAIN, MECHANISMS };

/* The extensions that the customer's response to EHLO names. */
enum offer { OFFER_ALL, OFFER_PIPELINING, OFFER_SIZE }; /* OFFER_PIPELINING: PIPELINING and SIZE */

/* A connected socket with buffers. Owned by one thread. */
struct stream {
    int fd;
    int wake_fd;       /* readable: the server shuts down, so waiting ends; -1: none */
    SSL *tls;          /* NULL: in the clear */
    int timeout;       /* seconds for one wait */
    int64_t deadline;  /* now_ms() at which waiting ends in any case; 0: none */
    int64_t until;     /* end of the wait under way */
    size_t sent;       /* octets sent since `until` was set */
    const char *broken; /* why the stream can no longer be used; NULL: it can */
    const char *ended;  /* why no more input will arrive; NULL: some may. Writing may still work */
    bool dry;           /* the last look at the socket found nothing */
    uint64_t gone;      /* octets that have left; not those in `out` nor, with TLS, those of a failed flush */
    bool woken, timed_out, tls_failed;
    bool line_records;   /* one TLS record a line: fetchmail 6.4 waits on the socket while its TLS library has lines */
    bool said_quit;      /* the peer said QUIT, so it sends no more */
    bool spoke;          /* something was sent since the last wait for input */
    unsigned long waits; /* waits for input after something was sent: round trips */
    size_t line_octets;  /* of the last line that was read, with its end */
    bool line_cut;       /* that line was too long for the buffer, which has only its beginning */
    size_t in_at, in_end, out_end;
    char in[STREAM_IN];
    char out[STREAM_OUT];
};

struct reply {
    int code;
    size_t octets;   /* as received, with line ends */
    char text[REPLY_KEPT]; /* without code; lines separated by \n; of an EHLO response only the known keywords */
};

struct scram_keys {
    unsigned char client[32], stored[32], server[32]; /* RFC 5802, 3; a server does not keep `client` */
};

/* What a server needs to check a client's proof and to give its own. */
struct verifier {
    int iterations;
    size_t salt_len;
    unsigned char salt[SALT_MAX];
    struct scram_keys keys;
};

struct account {
    char *name, *secret;
    char *domains;  /* a,b,c in lower case */
    int iterations; /* of its verifier; 0: it has a secret instead */
    size_t line;    /* of the accounts file */
};

/* The accounts file as read at one time. Shared: the last accounts_release() frees it. */
struct accounts {
    atomic_size_t users;
    int iterations;       /* of SCRAM, for names without a verifier: the count of most verifiers */
    unsigned char salt_key[32]; /* the salts of these names are computed with it */
    size_t count;
    struct account *list; /* by name */
};

enum field { NO_FIELD, RETURN_PATH, DELIVERED_TO, ENVELOPE_TO, X_ORIGINAL_TO, DELIVERY_DATE, FIELDS };

struct queued {
    int64_t second, micro; /* of arrival */
    char *path;            /* domain/new/name, owned */
};

/* The messages of a request, in order of arrival. It holds only their names; no file is open. */
struct backlog {
    int queue;
    struct queued *list;
    size_t count, room, next;
    const char *stopped; /* why the walk ended early; NULL: it did not */
};

/* The fate of a recipient. DELIVERED and RETURNED (refused, and the sender was told) are struck out in the file.
 * FOREIGN: of another domain, or not a mailbox. REPEATED: the same address is in the envelope before; this recipient
 * shares the fate of that one. */
enum verdict { OWED, FOREIGN, REPEATED, ACCEPTED, DELIVERED, DEFERRED, REFUSED, RETURNED, VERDICTS };

/* The text of a reply, kept for the notice: one copy for consecutive recipients with the same reply. */
struct reason {
    struct reason *next;
    bool ours;   /* not the customer's reply: the text is a status code (RFC 3463) and words, "4.4.7 ..." */
    char text[]; /* "550 5.1.1 no such user", escaped */
};

struct recipient {
    char *address;
    off_t at;                       /* where its @ is in the file */
    const struct recipient *first;  /* if REPEATED: the recipient that it repeats */
    const struct reason *reason;    /* if REFUSED */
    enum verdict fate;
};

/* A queued message. If message_claim() opened it, it is claimed as long as fd is open. */
struct message {
    int queue;
    const char *path; /* borrowed from the backlog */
    int fd;
    off_t size, start; /* of the file; where the message begins, after its envelope */
    dev_t device;
    ino_t inode;
    struct timespec arrived, changed; /* its times of modification and of status change */
    char *top;         /* its first top_len octets; freed, and top_len 0, when they are no longer needed */
    size_t top_len;
    enum field field;  /* the field that names its recipients */
    struct recipient *list; /* in the order of the envelope */
    size_t recipients;
    struct reason *reasons; /* of all its recipients, the newest first */
    char sender[MAILBOX_MAX + 2];
    char id[MESSAGE_ID_MAX]; /* its Message-ID with brackets, for the log; "": none was found */
    const char *held;  /* why it is never sent; NULL: it may be sent */
    const char *trouble; /* why it cannot be sent now, unless another session has claimed it */
    int problem;       /* the errno that caused `trouble` or FAILED */
    uint64_t wire_size; /* octets of content with CRLF line ends */
    bool lf_only;      /* the content has no CR */
    bool eight_bit;    /* the content has octets over 127 */
    bool utf8_header;  /* the header has octets over 127, and they are UTF-8 */
    bool utf8_address; /* the address of the sender, or of a recipient who is owed the message, is in UTF-8 */
    unsigned holders;  /* transactions under way, and send_message() */
    bool again;        /* it must be sent to some of its recipients again in this session */
    struct message *next; /* the next message that must be sent again */
};

/* Reads a message's file line by line, from next_read on. */
struct line_reader {
    const struct message *of;
    off_t next_read;        /* where the next octets of the file are read */
    off_t start, end;       /* of the line, with its line end */
    bool cut, nul, eight_bit; /* the line is too long and not whole; has a NUL octet; has octets over 127 */
    bool failed;            /* the file cannot be read; errno */
    size_t at, filled;
    char data[1024], line[1024];
};

/* One file that is delivered into a Maildir. */
struct delivery {
    int queue;
    FILE *file;
    bool published;    /* in new, no longer in tmp */
    bool same_message; /* as in the delivery before this one, for another domain */
    int problem;       /* in the first delivery of a message: the errno if one of its files failed, or 0 */
    char domain[MAILDIR_PATH], name[NAME_SIZE]; /* the domain, or a folder in it */
};

struct network {
    unsigned char address[16]; /* IPv4 as ::ffff:a.b.c.d */
    int bits;
};

/* When the interval of an account started (5.2.1-i). */
struct last_atrn {
    struct last_atrn *next;
    int64_t when;
    char name[];
};

/* The provider: its options, then what its threads share. */
struct provider {
    const char *listen[LISTENERS_MAX];
    size_t listen_count;
    const char *queue_path, *accounts_path, *name, *user, *sendmail;
    int max_age; /* days; 0: mail is never too old */
    bool first_look; /* the caretaker's first look through the queue */
    int64_t started; /* the second when that look began */
    enum trace trace;
    int interval, timeout, login_timeout; /* seconds */
    int max_sessions, max_per_address;
    struct network allow[NETWORKS_MAX];
    size_t allow_count;
    bool listen_tls[LISTENERS_MAX], require_tls, no_cram_md5;
    const char *cert, *key, *client_ca;
    int sockets[LISTENERS_MAX];
    bool socket_tls[LISTENERS_MAX];
    size_t socket_count;
    size_t refusals;        /* of connections, not yet in the log */
    int64_t refusals_until; /* now_ms() when the log gets their number */
    int queue;   /* the queue's directory */
    int wake_fd; /* readable once the server shuts down */
    pthread_attr_t thread_attributes;

    atomic_bool stopping; /* shared */
    pthread_mutex_t lock; /* shared; protects all members below */
    pthread_cond_t session_ended;
    struct accounts *accounts;
    SSL_CTX *tls_context;
    struct session *sessions;
    size_t session_count;
    struct last_atrn *last_atrn;
};

struct customer {
    const char *provider, *name;
    const char *user, *secret; /* either may be NULL if a certificate names the account */
    const char *domains; /* a,b,c; "": all */
    const char *smtp, *exec;
    const char *ca, *cert, *key; /* PEM files */
    bool tls, require_tls, insecure, quiet;
    bool stepwise;        /* the demo's: wait for Return */
    const char *unknown_mailbox; /* the demo's: RCPT for it is refused; NULL: none */
    enum offer offer;     /* the demo's: fewer extensions */
    enum mechanism mechanism; /* the only one to use; NO_MECHANISM: the strongest */
    SSL_CTX *tls_context;
    int queue;
    int timeout; /* seconds */
    enum trace trace;
};

/* One connection, on either side. Its thread owns it. The provider's lock protects `next` and `address`. The listener
 * reads the atomic members after SIGUSR1. */
struct session {
    unsigned long number;
    enum side self; /* our side */
    _Atomic(enum state) state;
    enum trace trace;
    const char *name; /* ours, in greetings */
    char peer[80];    /* its address, for the log */
    char peer_name[DOMAIN_MAX + 1]; /* its name in EHLO or HELO */
    bool protocol_broken; /* the peer broke the protocol, so its input is no longer trusted */
    bool stepwise;        /* the ladder waits for Return before each command */
    bool tls_drawn;       /* the ladder has marked where TLS begins */
    bool numbered;        /* the ladder numbers commands and replies: the customer offers PIPELINING */
    unsigned commands_drawn, replies_drawn; /* of the reversed state */
    struct session *next;
    unsigned char address[16];

    struct provider *provider;
    struct accounts *accounts;     /* a reference to the table of its last AUTH or ATRN; NULL before */
    const struct account *_Atomic account; /* NULL until authenticated; changes with that table, under the lock */
    atomic_size_t messages;        /* that the customer accepted for at least one recipient */
    const char *postponed;         /* why queued mail is not sent now */
    bool greeted;                  /* EHLO was seen */
    SSL_CTX *tls_context;          /* a reference; NULL: no TLS on this connection */
    bool tls_at_once;              /* implicit TLS */
    bool muted;                    /* the demo's provider: no log */
    bool quiet, progress;          /* the customer's: no summary; a line of progress on the terminal */
    int64_t last_progress;         /* now_ms() when that line was last written */
    bool hide_response;            /* the trace must not show the response under way */
    bool no_notices;               /* sendmail hung, so this session sends no more failure notices */
    int bad_commands, auth_failures;
    enum mechanism mechanism;      /* of the last AUTH */
    int64_t responded;             /* now_ms() of the last response to a challenge */
    struct backlog backlog;
    struct message *first; /* claimed before the reply to ATRN */

    char *argument; /* of the command in `line` */
    size_t line_len;
    ssize_t response_len;
    const char *asked; /* the domains of this ATRN: `domains`, or the account's */

    struct stream io; /* session_new() does not clear the members from here on */
    char line[AUTH_LINE + 1];
    char response[AUTH_LINE];
    char domains[ATRN_LINE]; /* that ATRN names, if it names some */
};

/* The customer's own mail server, reached through --smtp or --exec. */
struct receiver {
    struct session *session; /* NULL: none */
    struct reply greeting;
    pid_t child; /* 0: none */
};

/* ---- Functions, in the order of odmr.c ---- */

/* 1. The provider: its session, and the three states of sections 5.1, 5.2 and 5.3 */

/* The whole dialogue with one customer, up to the end of the connection. */
void provider_session(struct session *s);
/* Ends the session after read_line() has failed. After a time-out or at a shutdown the peer is still there, and the
 * 421 says why. */
void stop_waiting(struct session *s);
/* Ends the session with a 421 that says why. If the connection is lost, nothing is sent. */
void end_with_421(struct session *s, const char *why);

/* 2. The provider's commands: EHLO, STARTTLS, AUTH, ATRN, QUIT */

/* Moves the session, and its account if it has one, to the current accounts, because SIGHUP may have read new ones.
 * False: its account is gone or has another secret, and nothing was changed. */
bool accounts_renew(struct session *s);

/* 4. The customer as the client: from the greeting to ATRN (5.1, 5.2) */

/* One session from connect to close. Returns an exit code. */
int customer_session(const struct customer *c);
/* Returns the exit code of the reversed session. ended: it had a proper end. */
int session_outcome(struct session *s, bool ended, size_t messages, size_t unwritten);
/* Both log why a session failed, and return its exit code: the connection was lost; a command had the reply r. */
int exit_code_lost(const struct session *s);
int exit_code_refused(const struct session *s, const char *command, const struct reply *r, int permanent);

/* 5. The customer as the server: SMTP into a Maildir (5.3) */

/* The reversed session, which stores the mail in the Maildir. Returns an exit code. */
int take_mail_ourselves(struct session *s, const struct customer *c);

/* 6. SASL: each mechanism once */

const char *mechanism_name(enum mechanism m);
/* Returns NO_MECHANISM if no mechanism has that name. */
enum mechanism mechanism_named(const char *name);
/* The provider's half of AUTH, up to its last reply. initial: the initial response, or NULL. GO_ON: authenticated.
 * STAY: not authenticated, and the customer has the reply that says so. END: the session is over. */
enum next sasl_serve(struct session *s, enum mechanism m, const char *initial);
/* The customer's half. r: the response to EHLO, then the replies of this exchange. Returns EX_OK or the exit code. */
int sasl_prove(struct session *s, const struct customer *c, enum mechanism m, struct reply *r);
/* Returns the length; out has BASE64_SIZE(len) + 1 octets. */
size_t base64_encode(char *out, const void *data, size_t len);
/* RFC 5802 and 7677. False: OpenSSL failed. */
bool hmac_sha256(const unsigned char *key, size_t key_len, const char *text, unsigned char out[32]);
bool scram_keys(struct scram_keys *k, const char *secret, const unsigned char *salt, size_t salt_len, int iterations);
/* Parses iterations,salt,StoredKey,ServerKey. False: the text has another form, or the count is out of bounds. */
bool verifier_parse(const char *text, struct verifier *v);

/* 7. Failure notices */

/* Writes the fates of a message's recipients into the queue. It strikes out the delivered ones and, after the sender
 * has been told, the refused ones. When none is left, it removes the file. False: the file could not be removed or
 * written to, so the session must take no more from its box. */
bool update_queue(const struct provider *p, struct session *s, struct message *m);

/* 8. The queue: the envelope */

/* Returns the envelope field that a line starts, and where its value begins. */
enum field envelope_field(const char *line, size_t *value);
/* Reads the next line without its end. False: the file ends here, or cannot be read. */
bool next_line(struct line_reader *r);
/* Keeps the escaped text as a reason of the message. Code 0: the reason is ours. Returns NULL if out of memory. */
const struct reason *message_reason(struct message *m, int code, const char *text);

/* 8. The queue: Maildirs, messages, claims */

/* Does this errno say that there are too many open files, here or on this machine? */
bool short_of_descriptors(int problem);
/* Does this errno say that the file system is gone, and not only a file? Then no other file need be tried. */
bool file_system_gone(int problem);
/* Lists new and cur of each domain of a,b,c. False: a box could not be read to its end, and the log says why. What was
 * found is listed. Call backlog_free() in any case. */
bool backlog_read(struct backlog *b, const struct session *s, int queue, const char *domains);
/* Drops the remaining messages of the box that this path is in. */
void backlog_skip_box(struct backlog *b, const char *path);
/* Frees the list and its paths, not the struct. */
void backlog_free(struct backlog *b);
/* Calls visit for each domain of the queue or, if `all`, for each name that does not start with a dot. Stops when visit
 * returns false. False: visit did, or the queue cannot be read. */
bool for_each_name(int queue, bool all, bool (*visit)(void *context, int queue, const char *name), void *context);
/* The same for domains only. */
bool for_each_domain(int queue, bool (*visit)(void *context, int queue, const char *domain), void *context);
/* Removes unfinished deliveries. Always true, as for_each_domain() needs. */
bool clean_domain(void *context, int queue, const char *domain);
/* Frees message.top; from now on the file is read. */
void message_forget_top(struct message *m);
/* Opens a message without claiming it; access is O_RDWR or O_RDONLY. BUSY: m->trouble says why; if it is NULL, another
 * session was faster. Call message_close() in any case. */
enum claim message_open(struct message *m, int queue, const char *path, int access);
/* Reads the envelope of a message that is open: sender, recipients, where the message starts. BUSY: it cannot be read
 * now, and m->trouble says why. */
enum claim message_read(struct message *m);
/* Opens, claims, reads and scans a message. Call message_close() in any case. */
enum claim message_claim(struct message *m, int queue, const char *path);
/* Ends the claim and frees what the message holds, not the struct. */
void message_close(struct message *m);
/* Writes the content to the stream. False: the file could not be read, or was changed after the scan. */
bool message_send(const struct message *m, struct stream *to, bool dots);
/* Strikes out in the file the recipients that are delivered or returned. */
enum update message_strike_out(struct message *m);
/* Removes the file from the queue, because the message is delivered or its sender has been told. */
enum update message_remove(struct message *m);

/* 8. The queue: delivery into a Maildir */

/* Makes a file in tmp of the domain's Maildir or of a folder in it, and the directories if they are missing. False: no
 * file is left, and d->problem says why. */
bool delivery_open(struct delivery *d, int queue, const char *domain);
/* Closes and removes these files, in tmp or in new. */
void deliveries_discard(struct delivery *d, size_t count);
/* Opens one delivery for each domain of the recipients, with the envelope as its first fields. Returns their number.
 * Returns 0 if no file is left; then d->problem says why. */
size_t deliveries_open(struct delivery *d, int queue, const char *sender, char *const *recipients, size_t count);
/* Writes out the buffers of the files, which shows a full disk. False: no file is open, or a write failed; d->problem
 * says why. */
bool deliveries_written(struct delivery *d, size_t count);
/* Makes mail of the deliveries: puts each file on disk, renames it into new, and puts that directory on disk, too
 * (RFC 5321, 6.1). The files of one message become mail together, or none does. False: `problem` of the first file of a
 * message says whether and why the message failed. Discard those that did. */
bool deliveries_store(struct delivery *d, size_t count);
/* Stores a copy for the refused recipients on disk, in the folder .Undeliverable of the domain. */
bool message_set_aside(const struct message *m);

/* 9. Handing the session on: --smtp and --exec */

/* Connects to the receiver or starts it, and reads its greeting. Returns an exit code. If it is not EX_OK, the log says
 * why, and the consequence. */
int reach_receiver(const struct customer *c, struct receiver *receiver, const char *consequence);
/* Closes the connection to the receiver and ends the program of --exec. */
void leave_receiver(const struct customer *c, struct receiver *receiver);
/* Joins the session with the receiver. If the receiver has gone, it is reached again, once. Returns an exit code. */
int hand_session_on(struct session *s, const struct customer *c, struct receiver *receiver);

/* 10. Accounts */

/* Releases one reference; the last release frees the table. `all` may be NULL. */
void accounts_release(struct accounts *all);
/* Walks over a,b,c: returns the next domain and its length, and moves *list past it. Returns NULL after the last. */
const char *next_domain(const char **list, size_t *len);
/* Is this a list a,b,c of valid domains? */
bool domain_list_valid(const char *list);
/* Compares in any case of letters. */
bool domain_in_list(const char *list, const char *domain, size_t len);
/* Changes the list in place: lower case, and each domain once, at its first place. Without memory, repeated domains
 * stay. This does no harm, because the mail of the second is gone or claimed. */
void tidy_domains(char *list);
/* Returns NULL if no account has that name. The table owns the account. */
const struct account *account_find(const struct accounts *all, const char *name);
/* True, and v filled in: the account has a verifier and no secret. a may be NULL. */
bool account_verifier(const struct account *a, struct verifier *v);
/* Reads the file; the caller has the first reference. Returns NULL, and why, if it is not a valid accounts file. */
struct accounts *accounts_load(const char *path, char *why, size_t why_size);

/* 11. Lines and replies */

/* The address as text for the log: 127.0.0.1:366, [::1]:366. */
void address_text(char *out, size_t size, const struct sockaddr_storage *a, socklen_t len);
/* Makes a session over a connected socket, with its number and names; free() it. Returns NULL if out of memory. */
struct session *session_new(int fd, enum side self, int timeout, const char *name, enum trace trace);
/* CUSTOMER for PROVIDER, PROVIDER for CUSTOMER. */
enum side other_side(enum side side);
/* Sends and traces a line of the client: a command, a response to a challenge, the dot that ends a message. clause: for
 * the ladder, the requirement that the line keeps; NULL: none. A failure is noted in s->io.broken. */
void command(struct session *s, const char *clause, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
/* The same for a line of a reply. */
void reply(struct session *s, const char *clause, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
/* The same for a reply to a bad command, which is counted. After BAD_COMMANDS of them the session ends, because the
 * peer does not speak this protocol (a web browser, for example). */
void reply_bad_command(struct session *s, const char *clause, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
/* Reads a line into s->line. It is not traced, because it may hold a secret. Returns as stream_read_line(). */
bool read_line(struct session *s);
/* Splits s->line into the verb and s->argument. */
void split_command(struct session *s);
/* Is the verb of the command in s->line this one, in any case of letters? */
bool verb_is(const struct session *s, const char *verb);
/* Returns the clause of the EHLO keyword at the start of the line, or NULL if this program does not know it. Unknown
 * keywords are left out of the response, so that even a long one has room for the known ones. */
const char *keyword_clause(const char *line);
/* Reads, validates and traces a whole reply. clause: for the ladder, the requirement that the reply belongs to, or the
 * section or list of those that it may belong to. False: the connection is lost or the reply is malformed. */
bool read_reply(struct session *s, const char *clause, struct reply *r);
/* The same for EHLO: only known keywords are kept, and a response that is still too long is malformed. */
bool read_ehlo_reply(struct session *s, const char *clause, struct reply *r);
/* As read_reply(), but without flushing first, and after a failed write, too. Only for a reply to a command that has
 * left (stream.gone), after reply_arrived() was true. */
bool read_arrived_reply(struct session *s, const char *clause, struct reply *r);
/* Whether a whole reply has arrived, or as much of one as the buffer holds. Never waits. */
bool reply_arrived(struct session *s);
/* The text of a reply on one line, escaped, with " / " between its lines. */
void join_lines(const struct reply *r, char *out, size_t size);
/* DELIVERED: 2xx. DEFERRED: 4xx, and 3xx, because it is no acceptance. REFUSED: 5xx. */
enum verdict reply_verdict(const struct reply *r);
/* Walks over words up to the end of the line. Returns NULL after the last. */
const char *next_word(const char **list, size_t *len);
/* Is this one of the words of a list, in any case of letters? False if list is NULL. */
bool list_has(const char *list, const char *wanted);
/* Returns the parameters of a keyword of an EHLO response, or NULL if the keyword is not there. */
const char *reply_keyword(const struct reply *r, const char *keyword);
/* Copies all parameters of a keyword, on all its lines, with blanks between them; cut to size. False: there is no such
 * keyword. */
bool reply_parameters(const struct reply *r, const char *keyword, char *out, size_t size);
/* Is this one of the parameters of that keyword, on any of its lines? */
bool reply_offers(const struct reply *r, const char *keyword, const char *word);

/* 11. Addresses and domains */

/* 5.2.1-l: two labels or more of letters, digits and inner hyphens. */
bool domain_valid(const char *domain, size_t len);
/* Is the text all printable US-ASCII, blanks included? */
bool printable(const char *text, size_t len);
/* Has the text no octet over 127? */
bool ascii(const char *text);
/* Changes the text in place; ASCII letters only. */
void lower_case(char *text);
/* Returns the domain after the @, or NULL if there is none. */
const char *mailbox_domain(const char *mailbox);
/* How many octets at the start of the text are whole, valid UTF-8 (RFC 3629). */
size_t utf8_prefix(const char *text, size_t len);
/* Is this a mailbox of RFC 5321? The only definition, for envelopes, commands and options: one unquoted @; before it
 * atoms and dots in any order or a quoted string, in UTF-8; after it a domain of letters, digits, hyphens and dots. */
bool recipient_valid(const char *mailbox);
/* The same, or empty for the null sender; the domain may have underscores and UTF-8, or be an address literal. */
bool sender_valid(const char *mailbox);
/* Writes a line: `before`, then the date in the form of RFC 5322, 3.3. */
void write_date(FILE *out, const char *before, time_t when);

/* 12. The stream */

/* Milliseconds of a clock that never goes back. */
int64_t now_ms(void);
/* Takes over a connected socket. timeout: seconds for one wait. */
void stream_init(struct stream *s, int fd, int timeout);
/* Marks the stream as broken; the first reason is kept. why must live as long as the stream. */
void stream_break(struct stream *s, const char *why);
/* Sets the deadline for what is being read: the end of the wait under way, or so many seconds, whichever is earlier. */
void stream_bound(struct stream *s, int seconds);
/* Prepares TLS over this stream. host: we are the client, and the certificate must be for this host; NULL: we are the
 * server. Returns NULL if TLS is not available now. */
SSL *stream_offer_tls(struct stream *s, SSL_CTX *context, const char *host);
/* Sends what was written so far. False: the stream is broken. */
bool stream_flush(struct stream *s);
/* Starts TLS with the result of stream_offer_tls(), which the stream then owns. False: the stream is broken. */
bool stream_start_tls(struct stream *s, SSL *tls, const char *host);
/* Buffers octets, and sends them when the buffer is full. A failure is noted in s->broken. */
void stream_write(struct stream *s, const char *data, size_t len);
/* Returns room for len octets, at most 2 * WIRE_PART, in the stream's own buffer, which is sent first if necessary.
 * After writing there, call stream_add() with the number of octets. */
char *stream_space(struct stream *s, size_t len);
void stream_add(struct stream *s, size_t len);
/* Whether reading an octet would return at once: there is application data, or the end. Never waits. */
bool stream_ready(struct stream *s);
/* Whether the peer has closed its side. False if the connection was lost. */
bool stream_closed_by_peer(const struct stream *s);
/* Whether all that arrived has been read, and nothing more will arrive. */
bool stream_over(const struct stream *s);
/* Returns the length, with its end, of the line that starts offset octets after what was read; *line is valid until the
 * next call. Returns 0 if the line has not arrived whole. Conditions as of stream_has_line(). */
size_t stream_line_at(struct stream *s, size_t offset, const char **line);
/* Whether a whole line has arrived, or as much of one as the buffer holds. Never waits, not even for the rest of a TLS
 * record. Works after a failed write, too: then stream_read_line() gives such lines, but waits for no others. */
bool stream_has_line(struct stream *s);
/* Discards the input that has arrived so far. True: there was some. */
bool stream_discard_input(struct stream *s);
/* Discards all input of a broken stream, arrived or still to come. */
void stream_end_input(struct stream *s);
/* Waits for at least one octet of input, and shows it in the stream's own buffer until the next call. False: the stream
 * is broken. */
bool stream_peek(struct stream *s, const char **data, size_t *len);
/* Takes len octets of what stream_peek() showed. */
void stream_skip(struct stream *s, size_t len);
/* Reads a line without its CRLF or LF, ended by NUL. If it does not fit, the rest is discarded, and line_cut is set.
 * False: the stream is broken by a time-out, a shutdown or a lost connection. */
bool stream_read_line(struct stream *s, char *line, size_t size, size_t *len);
/* Flushes, and tells the peer that we send no more. The peer may still send. */
void stream_end(struct stream *s);
/* Flushes, gives the peer time to read our last reply, and closes. */
void stream_close(struct stream *s);

/* 12. TLS, and connecting */

/* Make contexts from PEM files; cert may be NULL for a client. Return NULL, and why, on failure. */
SSL_CTX *tls_server_context(const char *cert, const char *key, const char *client_ca, char *why, size_t size);
/* ca NULL: the system's authorities. */
SSL_CTX *tls_client_context(const char *ca, bool insecure, const char *cert, const char *key, char *why, size_t size);
/* Did the peer show a certificate, and did its chain verify? */
bool certificate_verified(SSL *tls);
/* Returns the index-th name of a certificate's owner, or NULL after the last. Free it with OPENSSL_free(). */
char *certificate_name(X509 *certificate, int index);
/* The octets of the channel for this type of binding. Returns their number, or 0 if they are not available. */
size_t channel_binding(SSL *tls, bool server, const char *type, unsigned char out[EVP_MAX_MD_SIZE]);
/* Splits "HOST", "HOST:PORT" or "[ADDRESS]:PORT". False: it is none of them, or too long. default_port may be NULL. */
bool split_host_port(const char *text, const char *default_port, char *host, size_t host_size, char *port,
                     size_t port_size);
/* Connects to the first address that answers. Returns the socket, or -1 and an exit code in *code. */
int connect_to(const char *where, const char *default_port, int timeout, int *code);

/* 13. Log and trace */

/* Writes text with every octet that is not printable ASCII as \xNN; cut to size. */
void escape(char *out, size_t size, const char *text);
/* Writes a word of the peer in quotes, cut to size. Backslash and quote are escaped, so that in the log the word cannot
 * look like the rest of the line or like an escaped octet. */
void quote(char *out, size_t size, const char *text);
/* Local time. A file can have a time that is outside the calendar; it counts as the start of 1970. */
struct tm local_time(time_t when);
/* For the provider: from now on a line of the log starts with the time or, for the journal, with its priority. */
void log_start(void);
/* One line on standard error, escaped; s may be NULL. The priority is one of syslog(3): LOG_ERR when the administrator
 * must act, LOG_WARNING, LOG_NOTICE, LOG_INFO. */
void log_event(const struct session *s, int priority, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
/* One line on standard error, then exit(code). For the start and for tools, never in a session. */
void die(int code, const char *fmt, ...) __attribute__((noreturn, format(printf, 2, 3)));
/* Returns the memory; NULL ends the program. For tools and the customer, never for a provider that serves. */
void *must_alloc(void *memory);
/* "1 message", "2 messages" */
const char *plural(uint64_t count);
/* Shows one line of the dialogue, from the side `who`, if the session is traced. */
void trace_line(struct session *s, enum side who, const char *clause, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));
/* Notes that the session is now in this state (section 5). */
void enter_state(struct session *s, enum state state);
/* On a terminal, shows the progress of the customer's session in a line. */
void show_progress(struct session *s, size_t messages, uint64_t octets);
/* Ends the line of progress, and logs the summary. */
void show_summary(const struct session *s, const char *what, size_t messages, uint64_t octets);

/* 13. Programs */

/* Starts argv[0], in a process group of its own, with these as its standard input and output (-1: ours). Returns 0 or
 * an errno. */
int start_program(char *const argv[], int in, int out, pid_t *pid);
/* Waits so many seconds for the program to end. Then its whole process group gets SIGTERM, and later SIGKILL. Returns
 * the exit status, or -1 if the program did not end by itself. */
int finish_program(pid_t pid, int seconds);

/* 14. The listener */

/* False: text is neither an address nor a prefix. */
bool network_parse(struct network *n, const char *text);
/* Serves until a signal stops it, and returns an exit code. An error at the start ends the program (sysexits). */
int provider_run(struct provider *p);

/* 15. The tools */

/* Opens the directory, and makes it first if `make`. The caller closes it. Returns -1 on failure; errno says why. */
int open_queue(const char *dir, bool make);

#endif
