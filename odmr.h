/* odmr.h: the map of odmr.c. Its parts, each with the function to enter by:
 *
 *    1  the provider's session, its three states                     provider_session
 *    2  the provider's commands: EHLO, STARTTLS, AUTH, ATRN, QUIT    atrn_command
 *    3  the provider as the client sends what it holds               send_mail
 *    4  the customer as the client, from the greeting to ATRN        client_dialogue
 *    5  the customer as the server; answers that wait for the disk   receive_mail; answer, answer_when_stored
 *    6  SASL: each mechanism with its two halves                     sasl_serve, sasl_prove
 *    7  failure notices, and what becomes of a message               update_queue
 *    8  the queue: envelope, message, claim, delivery                envelope_read, message_claim, deliveries_store
 *    9  the session handed on to another mail server                 hand_session_on
 *   10  accounts                                                     accounts_load
 *   11  lines and replies; addresses and domains                     command, reply, read_reply; recipient_valid
 *   12  the stream: octets with or without TLS, time-outs            stream_read_line, stream_flush
 *   13  log, trace, ladder; the programs that are run                log_event, trace_line; start_program
 *   14  the caretaker; the listener: threads, signals, shutdown      caretaker; provider_run
 *   15  tools, demo, options                                         main
 *
 * Below stand the constants, types and functions that more than one part uses. What one part uses stands in that part;
 * so does a static function that only parts below it use as well. */

#ifndef ODMR_H
#define ODMR_H

#ifndef __LP64__ /* 32 bits: messages over 2 GiB, times after 2038. Elsewhere it would only give calls other names */
#define _FILE_OFFSET_BITS 64
#define _TIME_BITS 64
#endif
#define _GNU_SOURCE /* accept4, flock, initgroups, ppoll, strcasestr, strverscmp; else C11 and POSIX.1-2008 */

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

#define ODMR_VERSION "0.1"

/* ---- Numbers, each with its reason ---- */

#define ODMR_PORT "366"          /* 4-a: reserved for On-Demand Mail Relay */
#define COMMAND_LINE 512         /* RFC 5321, 4.5.3.1.4: octets with CRLF */
#define ATRN_LINE 8192           /* our own: ATRN may name many domains */
#define AUTH_LINE 12288          /* RFC 4954, 4 */
#define SEND_LINE (AUTH_LINE + 64)
#define IDLE_COMMANDS 100        /* in a row, that bring no mail forward: then 421, on both sides */
#define DOMAIN_MAX 255           /* RFC 5321, 4.5.3.1.2 */
#define MAILBOX_MAX 320          /* 64 + @ + 255 (RFC 5321, 4.5.3.1) */
#define MESSAGE_ID_MAX 256       /* octets of a Message-ID in the log */
#define RECEIVE_BUFFER 212992    /* octets: what Linux grants by default (net.core.rmem_max) */
#define STREAM_IN 16384
#define STREAM_OUT 131072
#define COPY_SIZE 131072
#define WIRE_PART 4096           /* content becomes its wire form in such parts, twice as long at most */
#define LOG_LINE 1024            /* longer lines of the log are cut */
#define SALT_MAX 64
#define SCRAM_SCHEME "{SCRAM-SHA-256}"
#define SCRAM_ITERATIONS 4096    /* RFC 7677, 4: at least; what we ask of others and use ourselves */
#define SECRET_MAX 1024          /* room for a secret with a line end */
#define BYTE_ORDER_MARK "\xef\xbb\xbf" /* of UTF-8, as some editors write it */
#define LISTENERS_MAX 32
#define NETWORKS_MAX 64
#define TIMEOUT_MAX 86400
#define NAME_SIZE 128            /* of a file in a Maildir, when the name is ours */
#define UNDELIVERABLE ".Undeliverable" /* a Maildir++ folder */
#define MAILDIR_PATH (DOMAIN_MAX + 32) /* of a domain's Maildir or a folder of it, box included */
#define REFUSAL_SIZE 512         /* octets of a reply that a notice shows */
#define NOTICE_TIMEOUT 60        /* seconds for sendmail to take a notice */
#define BASE64_SIZE(n) (((n) + 2) / 3 * 4)

/* ---- Types ---- */

/* Where a session goes after a command. */
enum next { STAY, GO_ON, END }; /* in this state; to the next state; to its end */

/* What a look at a message of the queue, or at all mail of a request, has found. */
enum claim {
    CLAIMED, /* a message, and it is ours; one that is opened for reading only: it can be read */
    BUSY,    /* another session has it, or it cannot be read just now */
    HELD,    /* a message that is not sent, and message.held says why */
    NOTHING, /* none, or no longer */
};

/* What became of a change to a message's file. */
enum update {
    UPDATED,
    REPLACED, /* nothing was done: the name leads to another file now, or another program has written into this one */
    FAILED,   /* message.problem says why */
};

enum side { PROVIDER, CUSTOMER };

/* Section 5. QUIT ends each state; AUTH alone leads to the second, ATRN alone to the third (5-a). */
enum state { INITIAL, AUTHENTICATED, REVERSED };

/* Section 7: the codes of the memo. The rest are SMTP's.
 *   250 done            450 ATRN request refused           451 unable to process ATRN now
 *   453 no mail         502 command not implemented        530 authentication required */

enum trace { TRACE_OFF, TRACE_RFC, TRACE_LADDER };

/* The mechanisms of AUTH (5.1.2-a, 5.1.2-d). */
enum mechanism { NO_MECHANISM, CRAM_MD5, SCRAM, SCRAM_PLUS, EXTERNAL, PLAIN, MECHANISMS };

/* The extensions that the customer's response to EHLO names. */
enum offer { OFFER_ALL, OFFER_PIPELINING, OFFER_SIZE }; /* OFFER_PIPELINING: SIZE too */

/* A connected socket with buffers. Owned by one thread. */
struct stream {
    int fd;
    int wake_fd;       /* readable: stop waiting, the server shuts down; -1: none */
    SSL *tls;          /* NULL: in the clear */
    int timeout;       /* seconds for one wait */
    int64_t deadline;  /* now_ms() at which waiting ends in any case; 0: none */
    int64_t until;     /* end of the wait under way */
    size_t sent;       /* octets since that was set */
    const char *broken; /* why nothing works any more; NULL while it does */
    const char *ended;  /* why nothing more will arrive; NULL: something may. Writing may still work */
    bool dry;           /* the last look at the socket found nothing */
    uint64_t gone;      /* octets of ours that have left; those in out have not, nor those of a flush that failed */
    bool woken, timed_out, tls_failed;
    bool line_records;   /* of TLS: fetchmail 6.4 waits on the socket though its TLS library holds more lines */
    bool said_quit;      /* the peer did: nothing more will come from it */
    bool spoke;          /* something was sent since the last wait for input */
    unsigned long waits; /* how often we had spoken and then had to wait: round trips of the line */
    size_t line_octets;  /* of the line read last, with its end */
    bool line_cut;       /* it was too long for the buffer: only its beginning is there */
    size_t in_at, in_end, out_end;
    char in[STREAM_IN];
    char out[STREAM_OUT];
};

struct reply {
    int code;
    size_t octets;   /* as it came, with its line ends */
    char text[2048]; /* without code; lines separated by \n; of an EHLO response only the lines we know */
};

struct scram_keys {
    unsigned char client[32], stored[32], server[32]; /* RFC 5802, 3; client is not kept by a server */
};

/* What a server needs to know in order to check a proof, and to give one. */
struct verifier {
    int iterations;
    size_t salt_len;
    unsigned char salt[SALT_MAX];
    struct scram_keys keys;
};

struct account {
    char *name, *secret;
    char *domains;  /* a,b,c in lower case */
    int iterations; /* of its verifier; 0: it has a secret */
    size_t line;    /* of the accounts file */
};

/* The accounts file as it was read once. Shared: freed by whoever is the last to release it. */
struct accounts {
    atomic_size_t users;
    int iterations;       /* of SCRAM, for whoever has no verifier: what most verifiers have */
    unsigned char salt_key[32]; /* makes the salts of those */
    size_t count;
    struct account *list; /* by name */
};

enum field { NO_FIELD, RETURN_PATH, DELIVERED_TO, ENVELOPE_TO, X_ORIGINAL_TO, DELIVERY_DATE, FIELDS };

struct queued {
    int64_t second, micro; /* of arrival */
    char *path;            /* domain/new/name, owned */
};

/* The messages of a request, in order of arrival. Names only: nothing is open. */
struct backlog {
    int queue;
    struct queued *list;
    size_t count, room, next;
    const char *stopped; /* why the walk has ended before its end; NULL: it has not */
};

/* What became of a recipient. DELIVERED and RETURNED (refused, and the sender told) are struck out in the file.
 * REPEATED: the address stands in the envelope before; what becomes of that one becomes of this. */
enum verdict { OWED, FOREIGN, REPEATED, ACCEPTED, DELIVERED, DEFERRED, REFUSED, RETURNED, VERDICTS };

/* The text of a reply, kept for the notice: one copy for all recipients with the same reply. */
struct reason {
    struct reason *next;
    bool ours;   /* not the customer's: the text is "4.4.7 ...", a status code (RFC 3463) and words */
    char text[]; /* "550 5.1.1 no such user", escaped */
};

struct recipient {
    char *address;
    off_t at;                       /* where its @ is in the file */
    const struct recipient *first;  /* of REPEATED: the one it repeats */
    const struct reason *reason;    /* of REFUSED */
    enum verdict fate;
};

/* A message of the queue. One that message_claim() opened is claimed as long as fd is open. */
struct message {
    int queue;
    const char *path; /* borrowed from the backlog */
    int fd;
    off_t size, start; /* of the file; where the message begins below its envelope */
    dev_t device;
    ino_t inode;
    struct timespec arrived, changed; /* its times of modification and of status change */
    char *top;         /* its first octets, top_len of them; freed, and none, once they are of no more use */
    size_t top_len;
    enum field field;  /* the one that names its recipients */
    struct recipient *list; /* in the order of the envelope */
    size_t recipients;
    struct reason *reasons; /* all that its recipients have, the newest first */
    char sender[MAILBOX_MAX + 2];
    char id[MESSAGE_ID_MAX]; /* its Message-ID for the log, brackets and all; "": none was found */
    const char *held;  /* why it is not sent; NULL: it is */
    const char *trouble; /* why it cannot be sent now, if that is not another session's claim */
    int problem;       /* the errno behind trouble, or behind FAILED */
    uint64_t wire_size; /* octets of content with CRLF line ends */
    bool lf_only;      /* no CR, anywhere */
    bool eight_bit;    /* octets over 127, anywhere */
    bool utf8_header;  /* octets over 127 in the header, and they are UTF-8 */
    bool utf8_address; /* the sender's, or one of its recipients' */
    unsigned holders;  /* transactions under way */
    bool again;        /* some of its recipients are to be sent it once more in this session */
    struct message *next; /* of those messages */
};

/* Reads a message's file line by line, from next_read on. */
struct line_reader {
    const struct message *of;
    off_t next_read;        /* where the next octets of the file are read */
    off_t start, end;       /* of the line, with its line end */
    bool cut, nul, eight_bit; /* the line: was too long and is not whole; has a NUL octet; has octets over 127 */
    bool failed;            /* the file cannot be read; errno */
    size_t at, filled;
    char data[1024], line[1024];
};

/* One file on its way into a Maildir. */
struct delivery {
    int queue;
    FILE *file;
    bool published;    /* in new, no longer in tmp */
    bool same_message; /* as the delivery before it, for another domain */
    int problem;       /* the errno of what failed, for the first file of the message; 0: nothing */
    char domain[MAILDIR_PATH], name[NAME_SIZE]; /* the domain, or a folder of it */
};

struct network {
    unsigned char address[16]; /* IPv4 as ::ffff:a.b.c.d */
    int bits;
};

/* When an account last had an answer to ATRN (5.2.1-i). */
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
    bool first_look; /* the caretaker's: it has just started */
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
    size_t refusals;        /* of connections, that the log has no line for */
    int64_t refusals_until; /* now_ms() at which they are counted there */
    int queue;   /* the queue's directory */
    int wake_fd; /* readable once the server shuts down */
    pthread_attr_t thread_attributes;

    atomic_bool stopping; /* shared */
    pthread_mutex_t lock; /* shared, as is all below, under this lock */
    pthread_cond_t session_ended;
    struct accounts *accounts;
    SSL_CTX *tls_context;
    struct session *sessions;
    size_t session_count;
    struct last_atrn *last_atrn;
};

struct customer {
    const char *provider, *name;
    const char *user, *secret; /* either may be NULL where a certificate says who we are */
    const char *domains; /* a,b,c; "": all */
    const char *smtp, *exec;
    const char *ca, *cert, *key; /* PEM files */
    bool tls, require_tls, insecure, quiet;
    bool stepwise;        /* the demo's: wait for Return */
    const char *unknown_mailbox; /* the demo's: RCPT for it is refused; NULL: none */
    enum offer offer;     /* the demo's: fewer extensions */
    enum mechanism mechanism; /* this one only; NO_MECHANISM: the strongest */
    SSL_CTX *tls_context;
    int queue;
    int timeout; /* seconds */
    enum trace trace;
};

/* One connection, on either side. Owned by its thread; `next` and `address` by the provider's lock; what is atomic is
 * read by the listener, for SIGUSR1. */
struct session {
    unsigned long number;
    enum side self; /* who we are */
    _Atomic(enum state) state;
    enum trace trace;
    const char *name; /* ours, in greetings */
    char peer[80];    /* its address, for the log */
    char peer_name[DOMAIN_MAX + 1]; /* what it called itself */
    bool protocol_broken; /* nothing that the peer says is believed any more */
    bool stepwise;        /* the ladder waits for Return before each command */
    bool tls_drawn;       /* the ladder has marked where TLS begins */
    bool numbered;        /* the ladder numbers commands and replies: the customer offers PIPELINING */
    unsigned commands_drawn, replies_drawn; /* of the reversed state */
    struct session *next;
    unsigned char address[16];

    struct provider *provider;
    struct accounts *accounts;     /* a share in the table of its last AUTH or ATRN; NULL before */
    const struct account *_Atomic account; /* NULL until authenticated; another one of that table under the lock */
    atomic_size_t messages;        /* of which the customer has taken at least one copy */
    const char *postponed;         /* why mail that waits is not sent now */
    bool greeted;                  /* EHLO was seen */
    SSL_CTX *tls_context;          /* a share in it; NULL: no TLS here */
    bool tls_at_once;              /* from the first octet */
    bool muted;                    /* the demo's provider: no log */
    bool quiet, progress;          /* the customer's: no summary; a line of progress on the terminal */
    int64_t last_progress;         /* now_ms() of it */
    bool hide_response;            /* the response under way is not for the trace */
    bool no_notices;               /* sendmail hung: no more of them in this session */
    int bad_commands, auth_failures;
    enum mechanism mechanism;      /* of the last AUTH */
    int64_t responded;             /* now_ms() of the last response to a challenge */
    struct backlog backlog;
    struct message *first; /* claimed before ATRN was answered */

    char *argument; /* of the command in line */
    size_t line_len;
    ssize_t response_len;
    const char *asked; /* the domains of ATRN: those above, or the account's */

    struct stream io; /* from here on nothing is cleared when a session is made */
    char line[AUTH_LINE + 1];
    char response[AUTH_LINE];
    char domains[ATRN_LINE]; /* of ATRN, when it names some */
};

/* The customer's own mail server, behind --smtp or --exec. */
struct receiver {
    struct session *session; /* NULL: none */
    struct reply greeting;
    pid_t child; /* 0: none */
};

/* ---- Functions, in the order of odmr.c ---- */

/* 1. The provider: its session, and the three states of sections 5.1, 5.2 and 5.3 */

/* The whole dialogue with one customer, to the end of the connection. */
void provider_session(struct session *s);
/* For when read_line() has failed: ends the session, and tells the peer why if it is there, which is after a time-out
 * and at a shutdown. */
void stop_waiting(struct session *s);
/* Ends the session: 421, and why. Nothing is said if the peer is gone. */
void end_with_421(struct session *s, const char *why);

/* 2. The provider's commands: EHLO, STARTTLS, AUTH, ATRN, QUIT */

/* The session's accounts become those of now, for SIGHUP may have read others since, and so does its account, if it has
 * one already. False: that account is gone, or has another secret. */
bool accounts_renew(struct session *s);

/* 4. The customer as the client: from the greeting to ATRN (5.1, 5.2) */

/* One session from connect to close; an exit code. */
int customer_session(const struct customer *c);
/* The exit code of the reversed session; ended: it had a proper end. */
int session_outcome(struct session *s, bool ended, size_t messages, size_t unwritten);
/* Why a session failed, to the log, and its exit code: the connection was lost; this was the reply to a command. */
int exit_code_lost(const struct session *s);
int exit_code_refused(const struct session *s, const char *command, const struct reply *r, int permanent);

/* 5. The customer as the server: SMTP into a Maildir (5.3) */

/* The reversed session, with the mail into the Maildir. An exit code. */
int take_mail_ourselves(struct session *s, const struct customer *c);

/* 6. SASL: each mechanism once */

const char *mechanism_name(enum mechanism m);
/* NO_MECHANISM: there is none of that name. */
enum mechanism mechanism_named(const char *name);
/* The provider's half of AUTH, to its last reply; initial: the initial response, or NULL. GO_ON: authenticated. STAY:
 * not, and the customer has the reply that says so. */
enum next sasl_serve(struct session *s, enum mechanism m, const char *initial);
/* The customer's half; r: the response to EHLO, then the replies of this exchange. EX_OK, or the exit code. */
int sasl_prove(struct session *s, const struct customer *c, enum mechanism m, struct reply *r);
/* Returns the length; out has BASE64_SIZE(len) + 1 octets. */
size_t base64_encode(char *out, const void *data, size_t len);
/* RFC 5802 and 7677; each false only if OpenSSL fails. */
bool hmac_sha256(const unsigned char *key, size_t key_len, const char *text, unsigned char out[32]);
bool scram_keys(struct scram_keys *k, const char *secret, const unsigned char *salt, size_t salt_len, int iterations);
/* iterations,salt,StoredKey,ServerKey; false: it is not, or the count is out of bounds. */
bool verifier_parse(const char *text, struct verifier *v);

/* 7. Failure notices */

/* Writes the fates of a message's recipients into the queue. It strikes out the delivered ones, and the refused ones
 * once the sender has been told. When none is left, it removes the file. False: the file could not be removed or
 * written to, so no more is to be taken from its box. */
bool update_queue(const struct provider *p, struct session *s, struct message *m);

/* 8. The queue: the envelope */

/* Which field of an envelope a line starts, and where its value begins. */
enum field envelope_field(const char *line, size_t *value);
/* The next line without its end; false at the end of the file, or when it cannot be read. */
bool next_line(struct line_reader *r);
/* Reads the block into m: sender, recipients, where the message starts. BUSY: it cannot be read now,
 * and m->trouble says why. */
enum claim envelope_read(struct message *m);
/* The reason, kept by the message; text is escaped. Code 0: the reason is ours. NULL: out of memory. */
const struct reason *message_reason(struct message *m, int code, const char *text);

/* 8. The queue: Maildirs, messages, claims */

/* Does this errno say that there are too many open files, here or on this machine? */
bool short_of_descriptors(int problem);
/* Does this errno say that the file system is gone, and not only a file? Then no other file need be tried. */
bool file_system_gone(int problem);
/* Lists new and cur of each domain of a,b,c. False: something could not be read, and the log says what; the rest is
 * there. Free it in any case. */
bool backlog_read(struct backlog *b, const struct session *s, int queue, const char *domains);
/* Drops the messages that remain of the box that this path is in. */
void backlog_skip_box(struct backlog *b, const char *path);
/* The list and its paths, not the struct. */
void backlog_free(struct backlog *b);
/* Calls visit for each domain of the queue or, if all, for each name that starts with no dot, until one says false;
 * false then, or if the queue cannot be read. */
bool for_each_name(int queue, bool all, bool (*visit)(void *context, int queue, const char *name), void *context);
/* The same for domains alone. */
bool for_each_domain(int queue, bool (*visit)(void *context, int queue, const char *domain), void *context);
/* Removes what was never finished; fits for_each_domain(), always true. */
bool clean_domain(void *context, int queue, const char *domain);
/* Frees message.top; from now on the file is read. */
void message_forget_top(struct message *m);
/* Octets of its file, from memory if it still has them; as pread(2). */
ssize_t message_octets(const struct message *m, char *data, size_t size, off_t at);
/* Opens a message without claiming it; access is O_RDWR or O_RDONLY. BUSY: m->trouble says why;
 * without it, another session was faster. Close it in any case. */
enum claim message_open(struct message *m, int queue, const char *path, int access);
/* Reads the envelope of a message that is open. Results as of envelope_read(). */
enum claim message_read(struct message *m);
/* Opens, claims, reads and scans. Close it in any case. */
enum claim message_claim(struct message *m, int queue, const char *path);
/* Ends the claim and frees what the message holds, not the struct. */
void message_close(struct message *m);
/* Writes the content to the stream; false: it could not be read, or is not what was scanned. */
bool message_send(const struct message *m, struct stream *to, bool dots);
/* A copy for those who were refused, in the folder .Undeliverable of its domain, on disk. */
bool message_set_aside(const struct message *m);
/* Strikes out in the file the recipients that are delivered or returned. */
enum update message_strike_out(struct message *m);
/* Takes it out of the queue: it is delivered, or its sender has been told. */
enum update message_remove(struct message *m);

/* 8. The queue: delivery into a Maildir */

/* A file in tmp of the domain's Maildir, or of a folder of it, which is made if it is not there. False: nothing is
 * left; d->problem says why. */
bool delivery_open(struct delivery *d, int queue, const char *domain);
/* One delivery for each domain of the recipients, with the envelope as its first fields. Returns their number; 0:
 * nothing is left, and d->problem says why. */
size_t deliveries_open(struct delivery *d, int queue, const char *sender, char *const *recipients, size_t count);
/* Closes and removes these files, wherever they are. */
void deliveries_discard(struct delivery *d, size_t count);
/* Whether all files are open and all that was written has left our buffer: the disk was not full so far. False:
 * d->problem says why. */
bool deliveries_written(struct delivery *d, size_t count);
/* Makes mail of them: each on disk, renamed into new, and the directory that says so on disk too (RFC 5321, 6.1).
 * The files of one message become mail together, or none does. True: all are safe. Else problem says of the first
 * file of each message whether it failed, and why. Discard those that did. */
bool deliveries_store(struct delivery *d, size_t count);

/* 9. Handing the session on: --smtp and --exec */

/* Joins the session with the receiver, which is reached again, once, if it has gone. An exit code. */
int hand_session_on(struct session *s, const struct customer *c, struct receiver *receiver);
/* Connects to the receiver or starts it, and reads its greeting. An exit code; if it is not EX_OK, the log says why,
 * and the consequence. */
int reach_receiver(const struct customer *c, struct receiver *receiver, const char *consequence);
/* Closes the connection to the receiver and ends the program. */
void leave_receiver(const struct customer *c, struct receiver *receiver);

/* 10. Accounts */

/* Gives up one share; the last one frees the table. NULL is fine. */
void accounts_release(struct accounts *all);
/* Walks over a,b,c: the next domain and its length, *list behind it; NULL: no more of them. */
const char *next_domain(const char **list, size_t *len);
/* a,b,c, each valid. */
bool domain_list_valid(const char *list);
/* In any case of letters. */
bool domain_in_list(const char *list, const char *domain, size_t len);
/* The list in place as we want it: in lower case, each domain once, where it stands first. Without memory for that, a
 * domain that is there twice stays so: the second time its mail is gone, or claimed. */
void tidy_domains(char *list);
/* NULL: nobody has that name. Owned by the table. */
const struct account *account_find(const struct accounts *all, const char *name);
/* True, and v filled in, when all the account has is a verifier. a may be NULL. */
bool account_verifier(const struct account *a, struct verifier *v);
/* Reads the file; NULL, and why, when it is not what an accounts file must be. One user: the caller. */
struct accounts *accounts_load(const char *path, char *why, size_t why_size);

/* 11. Lines and replies */

/* The address as text for the log: 127.0.0.1:366, [::1]:366. */
void address_text(char *out, size_t size, const struct sockaddr_storage *a, socklen_t len);
/* A session over a connected socket, its numbers and names set; free() it. NULL: out of memory. */
struct session *session_new(int fd, enum side self, int timeout, const char *name, enum trace trace);
/* The customer of the provider, and the other way round. */
enum side other_side(enum side side);
/* A line of the client and CRLF, traced: a command, a response to a challenge, the dot that ends a message. clause: the
 * requirement that the line keeps, for the ladder; NULL: none. Failure shows in s->io.broken. */
void command(struct session *s, const char *clause, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
/* The same for a line of a reply. */
void reply(struct session *s, const char *clause, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
/* The same for a reply to a bad command, which is counted. After BAD_COMMANDS of them the session ends: the peer does
 * not speak this protocol (a web browser, for example). */
void reply_bad_command(struct session *s, const char *clause, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
/* A line into s->line, not traced, for it may hold a secret; results as of stream_read_line(). */
bool read_line(struct session *s);
/* s->line into verb and s->argument. */
void split_command(struct session *s);
/* Is the verb of the command in s->line this one, in any case of letters? */
bool verb_is(const struct session *s, const char *verb);
/* The clause of the EHLO keyword at the start of the line; NULL: this program does not know it. What else a server
 * offers is left out of its response: however much it is, none of these is lost. */
const char *keyword_clause(const char *line);
/* A whole reply, validated and traced. clause: the requirement it falls under, or the section or list of those it may
 * fall under, for the ladder. False: the connection is lost or the reply is malformed. */
bool read_reply(struct session *s, const char *clause, struct reply *r);
/* The same for EHLO: its keywords are taken as their lines come, and a response that is too long is no reply. */
bool read_ehlo_reply(struct session *s, const char *clause, struct reply *r);
/* The same as read_reply(), without flushing first, and after a failed write, too: for a reply of which
 * stream_has_line() has shown a line, to a command that has left (stream.gone). */
bool read_arrived_reply(struct session *s, const char *clause, struct reply *r);
/* Whether a whole reply has arrived, or as much of one as the buffer holds. Never waits. */
bool reply_arrived(struct session *s);
/* The text of a reply on one line, its lines parted by " / ", escaped. */
void join_lines(const struct reply *r, char *out, size_t size);
/* 2xx, 4xx, 5xx; 3xx counts as 4xx: who asks for more has not said yes. */
enum verdict reply_verdict(const struct reply *r);
/* The parameters behind a keyword of an EHLO response; NULL: it is not there. */
const char *reply_keyword(const struct reply *r, const char *keyword);
/* Is this one of the parameters of that keyword, on whichever of its lines? */
bool reply_offers(const struct reply *r, const char *keyword, const char *word);
/* Walks over words up to the end of the line; NULL: no more. */
const char *next_word(const char **list, size_t *len);
/* Is this one of the words of a list, in any case of letters? list may be NULL: then no. */
bool list_has(const char *list, const char *wanted);

/* 11. Addresses and domains */

/* 5.2.1-l: two labels or more of letters, digits and inner hyphens. */
bool domain_valid(const char *domain, size_t len);
/* All of it printable US-ASCII, blanks included. */
bool printable(const char *text, size_t len);
/* No octet over 127. */
bool ascii(const char *text);
/* In place; ASCII letters only. */
void lower_case(char *text);
/* Behind the @; NULL: no domain. */
const char *mailbox_domain(const char *mailbox);
/* How many octets at the start of the text are whole, valid UTF-8 (RFC 3629). */
size_t utf8_prefix(const char *text, size_t len);
/* RFC 5321's mailbox, the one definition for envelopes, commands and options: one unquoted @; before it atoms and
 * dots in any order or a quoted string, in UTF-8; behind it a domain of letters, digits, hyphens and dots. */
bool recipient_valid(const char *mailbox);
/* The same, or empty for the null sender; the domain may have underscores and UTF-8, or be an address literal. */
bool sender_valid(const char *mailbox);
/* A date as RFC 5322, 3.3, writes it, on a line of its own behind `before`. */
void write_date(FILE *out, const char *before, time_t when);

/* 12. The stream */

/* Milliseconds on a clock that only goes forward. */
int64_t now_ms(void);
/* Takes over a connected socket; timeout in seconds for any one wait. */
void stream_init(struct stream *s, int fd, int timeout);
/* Declares the stream useless; the first reason stands. why must live as long as the stream. */
void stream_break(struct stream *s, const char *why);
/* What is being read must be there in full within the wait under way, and within so many seconds: sets deadline. */
void stream_bound(struct stream *s, int seconds);
/* What TLS over this stream needs. host: we are the client and the certificate must be for it; NULL: we are
 * the server. NULL: it cannot be had now. */
SSL *stream_offer_tls(struct stream *s, SSL_CTX *context, const char *host);
/* TLS from here on, with what stream_offer_tls() made, which the stream then owns. False: broken. */
bool stream_start_tls(struct stream *s, SSL *tls, const char *host);
/* Sends what was written so far. False: broken. */
bool stream_flush(struct stream *s);
/* Buffers octets, sending when the buffer is full. Failure shows in s->broken. */
void stream_write(struct stream *s, const char *data, size_t len);
/* Room for len octets, no more than a WIRE_PART doubled, in the stream's own buffer, which is sent first if need be.
 * stream_add() says how many were put there. */
char *stream_space(struct stream *s, size_t len);
void stream_add(struct stream *s, size_t len);
/* Whether reading an octet would return at once: there is application data, or the end. Never waits. */
bool stream_ready(struct stream *s);
/* Whether the peer has ended what it sends, and the line was not cut. */
bool stream_closed_by_peer(const struct stream *s);
/* Whether all that arrived has been read, and nothing more will arrive. */
bool stream_over(const struct stream *s);
/* The length of the line, its end included, that starts offset octets behind what was read; *line is there until
 * the next call. 0: it has not arrived whole. Conditions as of stream_has_line(). */
size_t stream_line_at(struct stream *s, size_t offset, const char **line);
/* Whether a whole line has arrived, or as much of one as the buffer holds. Never waits, not for the rest of a line or
 * of a TLS record. After a write has failed (broken), too: then stream_read_line() gives such lines, but waits for
 * no others. */
bool stream_has_line(struct stream *s);
/* Throws away what has come so far; true if there was something. */
bool stream_discard_input(struct stream *s);
/* From now on no input comes, whatever the peer has sent or sends. */
void stream_end_input(struct stream *s);
/* At least one octet of input, in the stream's own buffer until the next call. False: broken. */
bool stream_peek(struct stream *s, const char **data, size_t *len);
/* Takes len octets of what stream_peek() showed. */
void stream_skip(struct stream *s, size_t len);
/* A line without its CRLF or LF, ended by NUL; if it does not fit, it is read to its end, and line_cut is set. False:
 * broken, because of the time, a shutdown or a loss. */
bool stream_read_line(struct stream *s, char *line, size_t size, size_t *len);
/* Flushes, and tells the peer that this is the end of what we send, and no cut; it may still send. */
void stream_end(struct stream *s);
/* Flushes, closes, and lets the peer read our last words. */
void stream_close(struct stream *s);

/* 12. TLS, and connecting */

/* Contexts from PEM files; cert may be NULL for a client. NULL, and why. */
SSL_CTX *tls_server_context(const char *cert, const char *key, const char *client_ca, char *why, size_t size);
/* ca NULL: the system's. */
SSL_CTX *tls_client_context(const char *ca, bool insecure, const char *cert, const char *key, char *why, size_t size);
/* Did the peer show a certificate, and did its chain verify? */
bool certificate_verified(SSL *tls);
/* The index-th name that a certificate gives its owner, to be freed by OPENSSL_free(); NULL: no more of them. */
char *certificate_name(X509 *certificate, int index);
/* The channel's octets for this type of binding; returns how many, 0: not to be had. */
size_t channel_binding(SSL *tls, bool server, const char *type, unsigned char out[EVP_MAX_MD_SIZE]);
/* "HOST", "HOST:PORT", "[ADDRESS]:PORT" taken apart. False: none of them, or too long. default_port may be NULL. */
bool split_host_port(const char *text, const char *default_port, char *host, size_t host_size, char *port,
                     size_t port_size);
/* Connects to the first address that answers. Returns the socket, or -1 and an exit code in *code. */
int connect_to(const char *where, const char *default_port, int timeout, int *code);

/* 13. Log and trace */

/* Text with every octet that is not printable ASCII as \xNN; cut to size. */
void escape(char *out, size_t size, const char *text);
/* A word of the peer in quotes, cut to size: backslash and quote are escaped, so that in a line of the log it cannot
 * pretend to be the rest of the line or an escaped octet. */
void quote(char *out, size_t size, const char *text);
/* A moment in local time. A file can have a time that the calendar does not reach: that counts as the start of 1970. */
struct tm local_time(time_t when);
/* For the provider: from here on a line of the log starts with the time or, for the journal, with its priority. */
void log_start(void);
/* One line on standard error, escaped; s may be NULL. The priority is one of syslog(3): LOG_ERR when the administrator
 * must act, LOG_WARNING, LOG_NOTICE, LOG_INFO. */
void log_event(const struct session *s, int priority, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
/* One line on standard error, then exit(code). For the start and for tools, never in a session. */
void die(int code, const char *fmt, ...) __attribute__((noreturn, format(printf, 2, 3)));
/* The memory, or the end of the program. For tools and for the customer, never for the provider once it serves. */
void *must_alloc(void *memory);
/* "1 message", "2 messages" */
const char *plural(uint64_t count);
/* One line of the dialogue, said by who; nothing unless the session is traced. */
void trace_line(struct session *s, enum side who, const char *clause, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));
/* Section 5: the session is in this state now. */
void enter_state(struct session *s, enum state state);
/* On a terminal, a line that tells how far the customer's session is. */
void show_progress(struct session *s, size_t messages, uint64_t octets);
/* Ends the line of progress, and logs the summary. */
void show_summary(const struct session *s, const char *what, size_t messages, uint64_t octets);

/* 13. Programs */

/* Starts argv[0], in a process group of its own, with these as its standard input and output (-1: ours). 0, or an
 * errno. */
int start_program(char *const argv[], int in, int out, pid_t *pid);
/* Waits so many seconds for its end. After them its whole process group gets SIGTERM, and in the end SIGKILL. The exit
 * status; -1: it did not end by itself. */
int finish_program(pid_t pid, int seconds);

/* 14. The listener */

/* False: text is neither an address nor a prefix. */
bool network_parse(struct network *n, const char *text);
/* Serves until a signal says stop; an exit code. What is wrong at the start ends the program (sysexits). */
int provider_run(struct provider *p);

/* 15. The tools */

/* The directory, made first if make; -1: errno says why. The caller closes it. */
int open_queue(const char *dir, bool make);
/* The message on standard input, for all of the recipients or none of them. An exit code. */
int enqueue(int queue, const char *sender, const char *name, char **recipients, int count);
/* The table of what waits, with every message if list; all there is if count is 0; domains that none of the accounts
 * (NULL: not known) has are marked. An exit code. */
int show_queue(int queue, char **domains, size_t count, bool list, const struct accounts *accounts);
/* Asks for the secret and prints the line of an accounts file; an exit code. */
int print_account(const char *name, const char *domains, bool scram);

/* 15. The demo */

#define DEMO_WAYS 3 /* to send the same mail */

/* What makes a session fail. */
enum demo_fault { NO_FAULT, FAIL_CUT, FAIL_REFUSE, FAIL_LATER, FAIL_LOST_REPLY, FAIL_FOREIGN, FAIL_LOCKED };

/* NO_FAULT: there is none of that name. */
enum demo_fault demo_fault_named(const char *name);

/* What is shown, and how. */
struct demo {
    bool ways[DEMO_WAYS]; /* plain, with PIPELINING, with CHUNKING */
    bool stepwise, tls;
    enum mechanism mechanism;
    enum demo_fault fault;
};

/* Sessions of this program with itself, explained on standard output; an exit code. */
int demo(const struct demo *d);

#endif
