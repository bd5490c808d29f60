/* The fuzz targets (libFuzzer): odmr.c as it is, in the world of fuzz.h, against input that nobody would send.
 *
 * A target plays one side of odmr and says what must be true whatever the other side does; libFuzzer looks for
 * input for which it is not, or which makes AddressSanitizer or UndefinedBehaviorSanitizer speak. The program
 * takes the target from its own name: build/fuzz/provider, build/fuzz/sender and so on are one file.
 * .ci/fuzz makes the seeds and runs them; build/fuzz/TARGET FILE plays one input again.
 *
 * Where a target judges what odmr.c did it counts for itself, from the octets that went over the line and from
 * what is on the disk, and asks no function of odmr.c. */

#include "fuzz.h"

#define main odmr_main
#include "odmr.c"
#undef main

#pragma clang attribute push(__attribute__((no_sanitize("coverage"))), apply_to = function)

/* ---- The input: some options, then what the peer says ---- */

static const uint8_t *input;
static size_t input_len;

/* The next octet's low six bits, so that seeds can be text: @ is 0, A is 1. */
static unsigned option(void)
{
    if (input_len == 0)
        return 0;
    input_len--;
    return *input++ & 63;
}

/* What all dialogues have in common. 1 and 2: a trace, 32: as a ladder. 4: octets come and go in pieces, and from the
 * disk too. 8: the peer has a certificate. 16: which does not verify. Then which call of the disk fails; 0: none. */
static void common_options(struct session *s)
{
    unsigned o = option();
    fails_at = option();
    s->trace = (o & 3) != 3 ? TRACE_OFF : o & 32 ? TRACE_LADDER : TRACE_RFC;
    piece = o & 4 ? 7 : 0;
    read_piece = o & 4 ? 11 : 0;
    peer_has_certificate = o & 8;
    verify_result = o & 16 ? X509_V_ERR_CERT_UNTRUSTED : X509_V_OK;
}

static struct session *new_session(enum side self)
{
    struct session *s = &the_session;
    memset(s, 0, offsetof(struct session, io));
    stream_init(&s->io, PEER_FD, 300);
    s->number = 1;
    s->self = self;
    s->name = self == PROVIDER ? "example.net" : "example.org";
    snprintf(s->peer, sizeof s->peer, "192.0.2.1:1024");
    snprintf(s->peer_name, sizeof s->peer_name, "unknown");
    s->provider = &the_provider;
    return s;
}

static void end_session(struct session *s)
{
    stream_close(&s->io);
    must(s->backlog.list == NULL && s->first == NULL);
    accounts_release(s->accounts);
}

/* ---- Text, looked at without the help of odmr.c ---- */

struct text {
    const char *at;
    size_t len;
};

/* Cuts the next line off, with its LF. False: there is no whole line. */
static bool cut_line(struct text *from, struct text *line)
{
    const char *lf = from->len ? memchr(from->at, '\n', from->len) : NULL;
    if (!lf)
        return false;
    *line = (struct text){from->at, (size_t)(lf + 1 - from->at)};
    from->at += line->len;
    from->len -= line->len;
    return true;
}

static bool same_word(const char *a, const char *b, size_t len)
{
    for (size_t i = 0; i < len; i++)
        if (toupper((unsigned char)a[i]) != toupper((unsigned char)b[i]))
            return false;
    return true;
}

static bool begins(struct text t, const char *word)
{
    return t.len >= strlen(word) && same_word(t.at, word, strlen(word));
}

static struct text without_end(struct text line)
{
    if (line.len && line.at[line.len - 1] == '\n')
        line.len--;
    if (line.len && line.at[line.len - 1] == '\r')
        line.len--;
    return line;
}

/* A reply: its code, the number of its lines, its octets. False: there is none, or it is not whole. */
struct heard {
    int code;
    struct text text;
};

static bool cut_reply(struct text *from, struct heard *reply)
{
    struct text line, start = *from;
    reply->code = 0;
    for (int lines = 0; lines < 128 && cut_line(from, &line); lines++) {
        struct text l = without_end(line);
        int code = 0;
        if (l.len < 3 || l.len > 2046 || memchr(l.at, '\0', l.len) || !strchr("2345", l.at[0]) ||
            !strchr("012345", l.at[1]) || !isdigit((unsigned char)l.at[2]) || (l.len > 3 && !strchr(" -", l.at[3])))
            return false;
        for (int i = 0; i < 3; i++)
            code = code * 10 + l.at[i] - '0';
        if (reply->code && reply->code != code)
            return false;
        reply->code = code;
        if (l.len == 3 || l.at[3] == ' ') {
            reply->text = (struct text){start.at, (size_t)(from->at - start.at)};
            return true;
        }
    }
    return false;
}

/* Is the keyword at the start of a line of this EHLO response, but the first? */
static bool offers(const struct heard *reply, const char *keyword)
{
    struct text t = reply->text, line;
    cut_line(&t, &line);
    while (cut_line(&t, &line)) {
        struct text l = without_end(line);
        if (l.len >= 4 && begins((struct text){l.at + 4, l.len - 4}, keyword) &&
            (l.len == 4 + strlen(keyword) || strchr(" =", l.at[4 + strlen(keyword)])))
            return true;
    }
    return false;
}

/* Every line that a server of ours says: three digits, printable ASCII, CRLF, and 512 octets at most, but for the
 * challenges of AUTH, which may be longer (RFC 4954, 4). */
static void check_replies(struct text t)
{
    struct text line;
    while (cut_line(&t, &line)) {
        must(line.len >= 5 && line.at[line.len - 2] == '\r');
        must(line.len <= (begins(line, "334 ") ? 12288 : 512));
        for (size_t i = 0; i < 3; i++)
            must(isdigit((unsigned char)line.at[i]));
        must(strchr(" -", line.at[3]) || line.len == 5);
        for (size_t i = 3; i < line.len - 2; i++)
            must(line.at[i] >= 0x20 && line.at[i] < 0x7f);
    }
    must(t.len == 0 || said_len > SAID_MAX / 2);
}

/* Every line that a client of ours says: CRLF, no control character, 512 octets at most, but for AUTH and ATRN. */
static void check_command(struct text line, size_t most)
{
    must(line.len >= 2 && line.len <= most && line.at[line.len - 2] == '\r');
    for (size_t i = 0; i < line.len - 2; i++)
        must((unsigned char)line.at[i] >= 0x20 && line.at[i] != 0x7f);
}

/* Content as it goes over the line: CRLF behind each line; with dots, those at the start of a line doubled. */
static size_t to_wire(char *out, const char *content, size_t len, bool dots)
{
    size_t n = 0;
    for (size_t i = 0; i < len;) {
        if (dots && content[i] == '.')
            out[n++] = '.';
        while (i < len && content[i] != '\r' && content[i] != '\n')
            out[n++] = content[i++];
        out[n++] = '\r';
        out[n++] = '\n';
        i += i + 1 < len && content[i] == '\r' && content[i + 1] == '\n' ? 2 : 1;
    }
    return n;
}

/* ---- The queue: some letters whose fate the referee knows to judge ---- */

enum { LETTERS = 6, CROWD = 30, WIRE_MAX = 16384 };

static char crowd_text[CROWD * 40 + 200], crowd_names[CROWD][24];

static struct letter {
    const char *path, *sender, *text; /* text: envelope and content */
    const char *recipients[CROWD + 1];
    size_t start; /* of the content; the rest is computed from it */
    size_t text_len, wire_len, dotted_len;
    char wire[WIRE_MAX], dotted[WIRE_MAX];
    bool eight_bit, utf8, held;
} letters[LETTERS] = {
    {.path = "example.org/new/1.M1.a", .sender = "ned@example.edu", .recipients = {"eva@example.org"},
     .text = "Return-Path: <ned@example.edu>\nDelivered-To: eva@example.org\n"
             "Subject: one\n\nText.\n.\n..\n.hidden\nno end"},
    {.path = "example.org/new/2.M1.a", .sender = "two@example.edu", .eight_bit = true,
     .recipients = {"eva@example.org", "adam@Example.ORG", "foreign@example.com"},
     .text = "Envelope-To: eva@example.org,\n <adam@Example.ORG>, foreign@example.com\nReturn-Path: <two@example.edu>\n"
             "Subject: two\r\n\r\n\xfc\r.a stray CR\r\n"},
    {.path = "example.com/cur/3.M1.a:2,S", .sender = "", .eight_bit = true, .utf8 = true,
     .recipients = {"\xc3\xbc@example.com", "eva@example.com"},
     .text = "Delivered-To: <\xc3\xbc@example.com>\nDelivered-To: eva@example.com\nSubject: \xc3\xbc\n\nthree\n"},
    {.path = "example.org/new/4.M1.a", .sender = "four@example.edu", .held = true, .recipients = {"x@example.edu"},
     .text = "Return-Path: <four@example.edu>\nDelivered-To: x@example.edu\nSubject: four\n\nfour\n"},
    {.path = "example.com/new/5.M1.a", .sender = "five@example.edu", .text = crowd_text},
    {.path = "example.org/new/6.M1.a", .sender = "\"s ix\"@example.edu", .recipients = {"eva@example.org"},
     .text = "X-Original-To: eva@example.org\nReturn-Path: <\"s ix\"@example.edu>\nDelivery-Date: now"},
};

static const char *content_start(const char *text)
{
    const char *at = strstr(text, "Subject:");
    return at ? at : text + strlen(text);
}

static void write_letters(void)
{
    size_t n = (size_t)sprintf(crowd_text, "Return-Path: <five@example.edu>\n");
    for (int i = 0; i < CROWD; i++) {
        snprintf(crowd_names[i], sizeof crowd_names[i], "r%d@example.com", i);
        n += (size_t)sprintf(crowd_text + n, "Delivered-To: %s\n", crowd_names[i]);
        letters[4].recipients[i] = crowd_names[i];
    }
    sprintf(crowd_text + n, "Subject: five\n\nfive\n");
    for (struct letter *l = letters; l < letters + LETTERS; l++) {
        l->text_len = strlen(l->text);
        l->start = (size_t)(content_start(l->text) - l->text);
        l->wire_len = to_wire(l->wire, l->text + l->start, l->text_len - l->start, false);
        l->dotted_len = to_wire(l->dotted, l->text + l->start, l->text_len - l->start, true);
    }
}

/* Which letters wait. The crowd waits alone, for it takes its time. */
static void fill_queue(unsigned which)
{
    for (size_t i = 0; i < LETTERS; i++)
        if (i == 4 ? which == 16 : which >> i & 1)
            put_file(letters[i].path, letters[i].text, letters[i].text_len);
}

/* ---- The referee of the provider's reversed state ----
 *
 * Reads the commands that were said and the replies that were heard, each in its order, and knows from that what
 * each recipient is owed. Then it looks at the disk: nobody has left the queue without a 2xx to the last octet,
 * or a 5xx of which the sender was told; content is as it was. */

enum { DELIVERED_TO_IT = 1, REFUSED_IT = 2, ACCEPTED_IT = 4 };

struct referee {
    struct text said, heard;
    struct heard ehlo;
    bool chunking, eight_bit, utf8, size;
    bool all_heard; /* each command had its reply */
    bool quit;
    unsigned char fate[LETTERS][CROWD];
    /* the transaction under way */
    struct letter *letter;
    bool mail_taken;
    unsigned char here[CROWD]; /* recipients of it */
    size_t last;
};

static bool next_reply(struct referee *x, struct heard *r)
{
    if (x->all_heard && cut_reply(&x->heard, r) && r->code != 421)
        return true;
    r->code = 0;
    return x->all_heard = false;
}

/* Is this reply to this command a verdict on the mail? After the lone dot any is. Elsewhere some are about the
   session. */
static bool final_refusal(const struct heard *r, const char *command)
{
    static const char about_session[] = "500 502 503 504 521 530 534 535 538";
    char code[8];
    snprintf(code, sizeof code, "%d", r->code);
    if (strcmp(command, "RCPT") == 0)
        return r->code >= 500 && r->code != 503 && r->code != 552;
    return r->code >= 500 && (strcmp(command, ".") == 0 || !strstr(about_session, code));
}

static void note_all(struct referee *x, unsigned char of, unsigned char fate)
{
    for (size_t i = 0; i < CROWD; i++)
        if (x->here[i] & of)
            x->fate[x->letter - letters][i] |= fate;
}

/* What the customer cannot take is refused before it is sent. */
static void refused_beforehand(struct referee *x)
{
    unsigned long long most = 0;
    bool limited = false;
    struct text t = x->ehlo.text, line;
    cut_line(&t, &line);
    while (cut_line(&t, &line) && !limited)
        if (line.len > 9 && begins((struct text){line.at + 4, 4}, "SIZE") && strchr(" =\r\n", line.at[8])) {
            limited = !strchr("\r\n", line.at[9]); /* another line may have the number */
            most = isdigit((unsigned char)line.at[9]) ? strtoull(line.at + 9, NULL, 10) : 0;
        }
    for (struct letter *l = letters; l < letters + LETTERS; l++)
        for (size_t i = 0; i < CROWD && l->recipients[i]; i++)
            if ((l->eight_bit && !x->eight_bit) || (!ascii(l->recipients[i]) && !x->utf8) ||
                (most > 0 && l->wire_len > most))
                x->fate[l - letters][i] |= REFUSED_IT;
}

static void judge_mail(struct referee *x, struct text line)
{
    struct heard r;
    size_t n = line.len;
    x->letter = NULL;
    x->last = 0;
    for (struct letter *l = letters; l < letters + LETTERS; l++) {
        size_t sender = strlen(l->sender);
        if (n > 11 + sender && memcmp(line.at + 11, l->sender, sender) == 0 && line.at[11 + sender] == '>')
            x->letter = l;
    }
    must(x->letter && !x->letter->held);
    must(x->eight_bit || !x->letter->eight_bit);
    memset(x->here, 0, sizeof x->here);
    x->mail_taken = next_reply(x, &r) && r.code < 300;
    for (size_t i = 0; i < CROWD && final_refusal(&r, "MAIL"); i++)
        x->fate[x->letter - letters][i] |= REFUSED_IT;
}

/* Which recipient of the letter this is, looked for from number i on, then from the first. */
static size_t recipient_number(const struct letter *l, size_t i, struct text who)
{
    for (size_t looks = 0; looks <= CROWD; looks++, i++) {
        i = i < CROWD && l->recipients[i] ? i : 0;
        if (strlen(l->recipients[i]) == who.len && memcmp(l->recipients[i], who.at, who.len) == 0)
            return i;
    }
    must(!"it is a recipient of this message");
    return 0;
}

static void judge_recipient(struct referee *x, struct text line)
{
    struct heard r;
    size_t i = recipient_number(x->letter, x->last, (struct text){line.at + 9, line.len - 12});
    size_t domain = strcspn(x->letter->path, "/");
    const char *at = strrchr(x->letter->recipients[i], '@') + 1;
    x->last = i;
    must(strlen(at) == domain && same_word(at, x->letter->path, domain));
    must(!(x->fate[x->letter - letters][i] & DELIVERED_TO_IT));
    must(x->utf8 || ascii(x->letter->recipients[i]));
    must(!x->here[i]);
    x->here[i] = next_reply(x, &r) && x->mail_taken && r.code < 300 ? ACCEPTED_IT : REFUSED_IT;
    if (final_refusal(&r, "RCPT"))
        x->fate[x->letter - letters][i] |= REFUSED_IT;
}

/* The reply to the last octet. Who does not know BDAT reads commands in what follows: then no reply counts any more. */
static void judge_content(struct referee *x, const char *command)
{
    struct heard r;
    if (next_reply(x, &r) && r.code < 300)
        note_all(x, ACCEPTED_IT, DELIVERED_TO_IT);
    if (final_refusal(&r, command))
        note_all(x, ACCEPTED_IT, REFUSED_IT);
    if (strcmp(command, "BDAT") == 0 && (r.code == 500 || r.code == 502 || r.code == 504))
        x->all_heard = false;
}

/* The content was said, or as much of it as the line let through; what comes behind it is no part of it. False: it
 * was cut. */
static bool content_said(struct referee *x, const char *content, size_t len)
{
    size_t n = len < x->said.len ? len : x->said.len;
    must(memcmp(x->said.at, content, n) == 0 || disk_failed);
    x->said.at += n;
    x->said.len -= n;
    return n == len;
}

static bool judge_data(struct referee *x)
{
    struct text dot;
    struct heard r;
    bool wanted = false;
    for (size_t i = 0; i < CROWD; i++)
        wanted |= x->here[i] == ACCEPTED_IT;
    if (!next_reply(x, &r) || r.code != 354) {
        if (final_refusal(&r, "DATA"))
            note_all(x, ACCEPTED_IT, REFUSED_IT);
        x->all_heard &= r.code >= 300;
        return true;
    }
    if ((wanted && !content_said(x, x->letter->dotted, x->letter->dotted_len)) || !cut_line(&x->said, &dot))
        return false;
    must(dot.len == 3 && memcmp(dot.at, ".\r\n", 3) == 0);
    judge_content(x, ".");
    return true;
}

static bool judge_chunk(struct referee *x, struct text line)
{
    char wanted[64];
    snprintf(wanted, sizeof wanted, "BDAT %zu LAST\r\n", x->letter->wire_len);
    must(x->chunking && line.len == strlen(wanted) && memcmp(line.at, wanted, line.len) == 0);
    if (!content_said(x, x->letter->wire, x->letter->wire_len))
        return false;
    judge_content(x, "BDAT");
    return true;
}

static void judge_hello(struct referee *x, struct text line)
{
    bool done = next_reply(x, &x->ehlo) && x->ehlo.code < 300;
    if (begins(line, "HELO") || !done)
        return;
    x->chunking = offers(&x->ehlo, "CHUNKING") && offers(&x->ehlo, "PIPELINING");
    x->eight_bit = offers(&x->ehlo, "8BITMIME");
    x->utf8 = offers(&x->ehlo, "SMTPUTF8");
}

static void judge_commands(struct referee *x)
{
    struct text line;
    struct heard r;
    bool first = true, greeted = cut_reply(&x->heard, &r) && r.code == 220;
    while (cut_line(&x->said, &line)) {
        must(!x->quit); /* nothing is said after it */
        check_command(line, 512);
        must((first && greeted) == begins(line, "EHLO "));
        must(greeted || begins(line, "QUIT\r\n"));
        first = false;
        if (begins(line, "MAIL FROM:<")) {
            if (x->ehlo.text.len)
                refused_beforehand(x);
            judge_mail(x, line);
        } else if (begins(line, "RCPT TO:<")) {
            judge_recipient(x, line);
        } else if (begins(line, "DATA\r\n")) {
            if (!judge_data(x))
                return;
        } else if (begins(line, "BDAT ")) {
            if (!judge_chunk(x, line))
                return;
        } else if (begins(line, "EHLO ") || begins(line, "HELO ")) {
            judge_hello(x, line);
        } else {
            must(begins(line, "RSET\r\n") || begins(line, "QUIT\r\n"));
            x->quit = begins(line, "QUIT\r\n");
            next_reply(x, &r);
        }
    }
}

/* Who is not struck out in the file. Nothing else in it has changed. */
static void find_owed(const struct file *f, const struct letter *l, bool owed[CROWD])
{
    memset(owed, 0, CROWD * sizeof *owed);
    if (!f)
        return;
    must(f->len == l->text_len);
    for (size_t i = 0; i < f->len; i++)
        must(f->data[i] == l->text[i] || (i < l->start && l->text[i] == '@' && f->data[i] == '='));
    for (size_t i = 0; i < CROWD && l->recipients[i]; i++)
        owed[i] = memmem(f->data, l->start, l->recipients[i], strlen(l->recipients[i])) != NULL;
}

/* Was it set aside, under whatever name? Mail from the null sender has nobody to be told. */
static bool set_aside(const struct letter *l)
{
    const char *content = l->text + l->start;
    size_t len = l->text_len - l->start, n;
    char folder[300];
    n = (size_t)snprintf(folder, sizeof folder, "%.*s/.Undeliverable/new/", (int)strcspn(l->path, "/"), l->path);
    for (const struct file *f = files; f < files + file_count; f++)
        if (f->there && f->synced && f->durable && strncmp(f->path, folder, n) == 0 && f->len >= len &&
            memcmp(f->data + f->len - len, content, len) == 0)
            return true;
    return false;
}

static void judge_queue(const struct referee *x)
{
    for (size_t i = 0; i < file_count; i++) {
        struct letter *l = letters;
        const struct file *f;
        bool owed[CROWD];
        if (!files[i].fixed)
            continue;
        while (strcmp(files[i].path, l->path) != 0)
            l++;
        f = file_named(l->path);
        find_owed(f, l, owed);
        for (size_t r = 0; r < CROWD && l->recipients[r]; r++) {
            unsigned char fate = x->fate[l - letters][r];
            bool told = l->sender[0] ? notices > 0 : set_aside(l);
            if (!owed[r])
                must((fate & DELIVERED_TO_IT) || ((fate & REFUSED_IT) && told));
            else if (x->quit && !disk_failed)
                must(!(fate & DELIVERED_TO_IT));
        }
        must(!f || f->synced || disk_failed);
    }
}

static void judge_reversal(struct text what_was_said, size_t heard_from)
{
    static struct referee x;
    memset(&x, 0, sizeof x);
    x.said = what_was_said;
    x.heard = (struct text){peer + heard_from, peer_at - heard_from};
    x.all_heard = true;
    judge_commands(&x);
    if (x.ehlo.text.len)
        refused_beforehand(&x);
    judge_queue(&x);
}

/* ---- provider: a whole session, from the greeting on ---- */

static void provider_options(void)
{
    unsigned o = option();
    the_provider.require_tls = o & 1;
    the_provider.no_cram_md5 = o & 2;
    the_provider.client_ca = o & 4 ? "ca.pem" : NULL;
    the_provider.interval = o & 8 ? 60 : 0;
    sendmail_result = o & 16 ? 75 : 0;
    the_session.tls_context = o & 32 ? CONTEXT_TOKEN : NULL;
}

static void forget_last_atrn(void)
{
    while (the_provider.last_atrn) {
        struct last_atrn *last = the_provider.last_atrn;
        the_provider.last_atrn = last->next;
        free(last);
    }
}

/* Nobody gets in without a proof: a digest that is equal, or a certificate that verified and names him. */
static void check_login(const struct session *s, bool welcomed)
{
    must(welcomed == (s->account != NULL) || s->io.broken); /* a reply that did not get through */
    must(!welcomed || s->account);
    if (!s->account || proofs > 0)
        return;
    must(the_provider.client_ca && peer_has_certificate && verify_result == X509_V_OK);
    must(strcmp(s->account->name, "example.org") == 0);
}

static void fuzz_provider(void)
{
    static const char turned[] = "250 OK now reversing the connection\r\n";
    struct session *s = new_session(PROVIDER);
    struct text before = {said, 0}, line, all;
    bool reversed = false, welcomed = false;
    common_options(s);
    provider_options();
    fill_queue(option());
    peer_says(input, input_len);
    provider_session(s);
    all = (struct text){said, said_len};
    while (!reversed && cut_line(&all, &line)) {
        before.len += line.len;
        welcomed |= starts_with(line.at, line.len, "235 ");
        reversed = starts_with(line.at, line.len, turned);
    }
    check_replies(before);
    check_login(s, welcomed);
    must(!reversed || s->account);
    must(reversed || all.len == 0);
    if (reversed)
        judge_reversal(all, last_claim);
    else
        for (size_t i = 0; i < file_count; i++)
            must(!files[i].fixed || files[i].there);
    must(s->backlog.list == NULL && s->first == NULL);
    forget_last_atrn();
}

/* ---- sender: the provider's reversed state alone, against any replies ---- */

static void fuzz_sender(void)
{
    struct session *s = new_session(PROVIDER);
    enum claim got = BUSY;
    common_options(s);
    provider_options();
    fill_queue(option());
    peer_says(input, input_len);
    s->account = account_find(the_provider.accounts, "example.org");
    s->state = AUTHENTICATED;
    if (backlog_read(&s->backlog, s, QUEUE_FD, "example.org,example.com"))
        got = claim_next(s, &s->backlog, &s->first);
    if (got == CLAIMED)
        reversed_state(s);
    else
        backlog_free(&s->backlog);
    stream_flush(&s->io);
    judge_reversal((struct text){said, said_len}, 0);
    end_session(s);
}

/* ---- receiver: the customer's server half ----
 *
 * Its referee pairs each command with its reply; what was answered 250 must be in new/, whole and on disk, before
 * that reply leaves. */

static const char stored[] = "250 2.0.0 OK, message stored\r\n";

struct mailbox_referee {
    struct text said, heard;
    char domains[DOMAINS_A_MESSAGE][DOMAIN_MAX + 1]; /* of this message's recipients, each once */
    size_t count[DOMAINS_A_MESSAGE], domain_count, recipients;
    char content[PEER_MAX + 2]; /* of this message, with LF */
    size_t len;
    bool chunks;
    char postmaster[DOMAIN_MAX + 1]; /* the domain of the one without */
    size_t messages;
    size_t taken[FILES_MAX]; /* this file of new/ belongs to a message already */
};

/* A reply leaves: as many files must be safe as messages were promised. */
static void check_promises(void)
{
    static size_t promised, looked_at;
    size_t durable = 0;
    if (looked_at > said_len)
        promised = looked_at = 0;
    for (const char *p; (p = memmem(said + looked_at, said_len - looked_at, stored, sizeof stored - 1)); promised++)
        looked_at = (size_t)(p - said) + sizeof stored - 1;
    if (said_len > looked_at + sizeof stored)
        looked_at = said_len - sizeof stored; /* it may have left in pieces */
    for (size_t i = 0; i < file_count; i++)
        durable += files[i].there && files[i].durable && strstr(files[i].path, "/new/");
    must(promised <= durable);
}

/* Is this file the message as the domain's Maildir must have it: envelope, trace fields, content? */
static bool is_delivery(const struct mailbox_referee *x, size_t d, const struct file *f)
{
    struct text t = {f->data, f->len - x->len}, line;
    size_t fields = 0;
    if (f->len < x->len || memcmp(f->data + t.len, x->content, x->len) != 0)
        return false;
    if (!cut_line(&t, &line) || !begins(line, "Return-Path: <"))
        return false;
    while (cut_line(&t, &line) && begins(line, "Delivered-To: "))
        fields++;
    if (fields != x->count[d] || !begins(line, "Received: from "))
        return false;
    for (int more = 0; more < 2; more++)
        if (!cut_line(&t, &line) || line.at[0] != '\t')
            return false;
    return t.len == 0;
}

/* The oldest such file that belongs to no other message. */
static void find_delivery(struct mailbox_referee *x, size_t d)
{
    char box[DOMAIN_MAX + 8];
    size_t n = (size_t)snprintf(box, sizeof box, "%s/new/", x->domains[d]), i = 0;
    while (i < file_count && !(files[i].there && !x->taken[i] && strncmp(files[i].path, box, n) == 0 &&
                               is_delivery(x, d, &files[i])))
        i++;
    must(i < file_count);
    x->taken[i] = true;
    must(files[i].synced && files[i].durable);
}

static void forget_message(struct mailbox_referee *x)
{
    x->domain_count = x->recipients = x->len = 0;
    x->chunks = false;
}

/* The reply to the last octet. */
static void content_answered(struct mailbox_referee *x, const struct heard *r)
{
    if (r->code == 250) {
        must(x->recipients > 0);
        if (!x->postmaster[0])
            memcpy(x->postmaster, x->domains[0], sizeof x->postmaster);
        for (size_t d = 0; d < x->domain_count; d++)
            find_delivery(x, d);
        x->messages++;
    }
    forget_message(x);
}

static void note_recipient(struct mailbox_referee *x, struct text line)
{
    char domain[DOMAIN_MAX + 1] = "";
    const char *at = memrchr(line.at, '@', line.len), *end = memrchr(line.at, '>', line.len);
    size_t d = 0;
    must(end && (at ? end > at && (size_t)(end - at - 1) < sizeof domain : x->postmaster[0] != '\0'));
    for (size_t i = 0; at && at + 1 + i < end; i++)
        domain[i] = (char)tolower((unsigned char)at[1 + i]);
    if (!at)
        memcpy(domain, x->postmaster, sizeof domain);
    x->recipients++;
    while (d < x->domain_count && strcmp(x->domains[d], domain) != 0)
        d++;
    if (d == DOMAINS_A_MESSAGE)
        return; /* it will be refused */
    if (d == x->domain_count) {
        memcpy(x->domains[d], domain, sizeof domain);
        x->count[d] = 0;
        x->domain_count++;
    }
    x->count[d]++;
}

/* Octets of content into lines that end with LF. False: a CR or LF by itself, so there must be no 250. */
static bool add_content(struct mailbox_referee *x, const char *data, size_t len, bool dots)
{
    bool line_start = true;
    x->len = 0;
    for (size_t i = 0; i < len; i++) {
        if (line_start && dots && data[i] == '.' && ++i == len)
            break;
        if (data[i] == '\n' || (data[i] == '\r' && (i + 1 == len || data[i + 1] != '\n')))
            return false;
        line_start = data[i] == '\r';
        i += line_start;
        if (x->len == 0 && (data[i] == ' ' || data[i] == '\t'))
            x->content[x->len++] = '\n'; /* it must not continue the field above it */
        x->content[x->len++] = data[i];
    }
    if (len > 0 && x->content[x->len - 1] != '\n')
        x->content[x->len++] = '\n';
    return true;
}

/* What is behind 354, up to and without the lone dot. */
static bool cut_content(struct mailbox_referee *x, struct text *content)
{
    const char *end = memmem(x->heard.at, x->heard.len, "\r\n.\r\n", 5);
    *content = (struct text){x->heard.at, end ? (size_t)(end + 2 - x->heard.at) : 0};
    if (begins(x->heard, ".\r\n"))
        content->len = 0;
    else if (!end)
        return false;
    x->heard.at += content->len + 3;
    x->heard.len -= content->len + 3;
    return true;
}

static bool data_heard(struct mailbox_referee *x, const struct heard *go_ahead)
{
    struct text content;
    struct heard r;
    bool sound;
    if (go_ahead->code != 354)
        return true;
    if (!cut_content(x, &content) || !cut_reply(&x->said, &r))
        return false;
    sound = add_content(x, content.at, content.len, true);
    must(sound || r.code != 250);
    content_answered(x, &r);
    return true;
}

/* BDAT's octets, which come before its reply; they are gathered as they came, and looked at when LAST is in. */
static bool chunk_heard(struct mailbox_referee *x, struct text line)
{
    static char chunks[PEER_MAX];
    char command[64] = "", *end;
    unsigned long long n;
    struct heard r;
    bool last;
    memcpy(command, line.at, line.len < sizeof command - 1 ? line.len : sizeof command - 1);
    n = strtoull(command + 5, &end, 10);
    last = strncasecmp(end, " LAST", 5) == 0;
    if (line.len >= sizeof command || end == command + 5 || !isdigit((unsigned char)command[5]) || n > x->heard.len)
        return false; /* no number, or not so many octets came: no 250 in either case, see receiver_heard() */
    if (!x->chunks)
        x->len = 0;
    memcpy(chunks + x->len, x->heard.at, n);
    x->len += n;
    x->chunks = true;
    x->heard.at += n;
    x->heard.len -= n;
    if (!cut_reply(&x->said, &r))
        return false;
    if (r.code == 503)
        x->chunks = false;
    else if (r.code == 501)
        return false;
    else if (last) {
        bool sound = add_content(x, chunks, x->len, false);
        must(sound || r.code != 250);
        content_answered(x, &r);
    }
    return true;
}

static void receiver_heard(struct mailbox_referee *x)
{
    struct text line;
    struct heard r;
    must(cut_reply(&x->said, &r) && r.code == 220);
    while (cut_line(&x->heard, &line)) {
        struct text l = without_end(line);
        bool command = line.len <= AUTH_LINE && !memchr(l.at, '\0', l.len);
        while (l.len > 0 && l.at[l.len - 1] == ' ')
            l.len--;
        if (command && begins(l, "BDAT") && (l.len == 4 || l.at[4] == ' ')) {
            if (!chunk_heard(x, l))
                break;
            continue;
        }
        if (!cut_reply(&x->said, &r))
            break;
        if (!command)
            continue;
        if (begins(l, "RCPT ") && r.code == 250)
            note_recipient(x, l);
        else if (begins(l, "DATA") && !data_heard(x, &r))
            break;
        else if ((begins(l, "RSET") || begins(l, "EHLO") || begins(l, "HELO")) && r.code == 250)
            forget_message(x);
        else if (r.code == 221)
            break;
    }
}

static void fuzz_receiver(void)
{
    static struct mailbox_referee x;
    struct session *s = new_session(CUSTOMER);
    struct customer c = {.name = "example.org", .queue = QUEUE_FD, .quiet = true, .domains = ""};
    size_t promised = 0;
    int code;
    common_options(s);
    if (option() & 1)
        c.domains = "example.org,example.com";
    peer_says(input, input_len);
    when_said = check_promises;
    code = take_mail_ourselves(s, &c);
    check_replies((struct text){said, said_len});
    memset(&x, 0, offsetof(struct mailbox_referee, content));
    memset(&x.len, 0, sizeof x - offsetof(struct mailbox_referee, len));
    if (*c.domains)
        strcpy(x.postmaster, "example.org");
    x.said = (struct text){said, said_len};
    x.heard = (struct text){peer, peer_at};
    receiver_heard(&x);
    for (const char *p = said; (p = memmem(p, (size_t)(said + said_len - p), stored, sizeof stored - 1)); p++)
        promised++;
    must(x.messages == promised);
    must(code != EX_OK || promised > 0);
    for (size_t i = 0; i < file_count; i++) /* nothing half-written, and nothing that was not promised */
        must(!files[i].there || disk_failed || (strstr(files[i].path, "/new/") && x.taken[i]));
    end_session(s);
}

/* ---- customer: its client half, against any provider ---- */

/* As it is, or in base64 in any of its three positions. */
static bool has_secret(const char *text, size_t len)
{
    return memmem(text, len, "tanstaaf", 8) || memmem(text, len, "dGFuc3RhYW", 10) ||
           memmem(text, len, "RhbnN0YW", 8) || memmem(text, len, "0YW5zdGFhZ", 10);
}

/* The secret does not leave, but inside TLS whose certificate verified. (Who says it in a nonce hears it again.) */
static void check_secrecy(const struct session *s)
{
    if (s->io.tls && verify_result == X509_V_OK && peer_has_certificate)
        return;
    must(!has_secret(said, said_len) || has_secret(peer, peer_at));
}

static bool was_said(const char *line)
{
    return memmem(said, said_len, line, strlen(line)) != NULL;
}

/* That a login succeeded can be seen in what was said last; SCRAM wants the provider's proof as well. */
static void check_authenticated(void)
{
    must(was_said("AUTH "));
    must(proofs > 0 || !was_said("AUTH SCRAM-"));
}

static void customer_options(struct customer *c)
{
    unsigned o = option();
    *c = (struct customer){.provider = "example.net", .name = "example.org", .user = "example.org",
                           .secret = "tanstaaf", .domains = o & 1 ? "example.org" : "", .queue = QUEUE_FD,
                           .require_tls = o & 2, .cert = "cert.pem", .quiet = o & 4,
                           .tls_context = CONTEXT_TOKEN};
    c->mechanism = (o >> 3) % MECHANISMS;
    if (c->mechanism == EXTERNAL)
        c->secret = NULL;
}

static void fuzz_customer(void)
{
    struct session *s = new_session(CUSTOMER);
    struct customer c;
    struct text t, line;
    int code;
    common_options(s);
    customer_options(&c);
    peer_says(input, input_len);
    code = client_dialogue(s, &c);
    stream_flush(&s->io);
    t = (struct text){said, said_len};
    while (cut_line(&t, &line))
        check_command(line, AUTH_LINE);
    must(t.len == 0);
    check_secrecy(s);
    must(code != EX_OK || (was_said("\r\nATRN") && (s->io.tls || !c.require_tls)));
    if (code == EX_OK)
        check_authenticated();
    if (was_said("\r\nATRN"))
        must(s->state == AUTHENTICATED);
    if (s->state == AUTHENTICATED)
        check_authenticated();
    end_session(s);
}

/* ---- sasl: each mechanism, on both sides, inside TLS or not ---- */

static void sasl_server(struct session *s)
{
    enum next got = STAY;
    bool welcomed;
    s->greeted = true;
    while (got == STAY && read_command(s) && verb_is(s, "AUTH"))
        got = auth_command(s);
    stream_flush(&s->io);
    welcomed = memmem(said, said_len, "235 now authenticated as ", 25) != NULL;
    must(welcomed == (got == GO_ON));
    check_replies((struct text){said, said_len});
    check_login(s, welcomed);
}

static void sasl_client(struct session *s, const struct customer *c)
{
    static struct reply r;
    int code;
    snprintf(r.text, sizeof r.text, "x\nAUTH CRAM-MD5 SCRAM-SHA-256 SCRAM-SHA-256-PLUS EXTERNAL PLAIN\nATRN");
    code = client_authenticate(s, c, &r);
    stream_flush(&s->io);
    check_secrecy(s);
    must(code != EX_OK || r.code == 235);
    if (code == EX_OK)
        check_authenticated();
}

static void fuzz_sasl(void)
{
    unsigned o = option();
    struct session *s = new_session(o & 1 ? CUSTOMER : PROVIDER);
    struct customer c;
    common_options(s);
    if (o & 1)
        customer_options(&c);
    else
        provider_options();
    the_provider.require_tls = false;
    s->io.tls = o & 2 ? TLS_TOKEN : NULL;
    peer_says(input, input_len);
    if (o & 1)
        sasl_client(s, &c);
    else
        sasl_server(s);
    end_session(s);
}

/* ---- message: whatever lies in the queue ---- */

#define MESSAGE "example.org/new/1.M1.a"

static char recipients[2][65536];

/* Those who are owed the message, one a line, each fit to be said; how many. */
static size_t list_owed(const struct message *m, char *out, size_t size)
{
    size_t count = 0, n = 0;
    out[0] = '\0';
    for (size_t i = 0; i < m->recipients; i++) {
        const struct recipient *r = &m->list[i], *as = r->fate == REPEATED ? r->first : r;
        must(as->fate == FOREIGN || (recipient_valid(r->address) && strlen(r->address) <= MAILBOX_MAX));
        must(r->fate != REPEATED || strcasecmp(r->address, r->first->address) == 0);
        if (r->fate != OWED)
            continue;
        n += (size_t)snprintf(out + n, size - n, "%s\n", r->address);
        must(n < size);
        count++;
    }
    return count;
}

/* Where the content starts, no envelope line may be lost to it, and none of it to the envelope. */
static void check_start(const struct message *m, const char *data, size_t len)
{
    static const char *const fields[] = {"Return-Path:", "Delivered-To:", "Envelope-To:", "X-Original-To:",
                                         "Delivery-Date:"};
    struct text t = {data, len}, line;
    size_t start = 0;
    bool has_sender = false;
    for (bool more = true; more;) {
        bool last = !cut_line(&t, &line);
        if (last)
            line = t;
        more = line.len > 0 && start > 0 && (line.at[0] == ' ' || line.at[0] == '\t');
        for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
            more |= begins(line, fields[i]) && !(i == 0 && has_sender);
        has_sender |= begins(line, fields[0]);
        start += more ? line.len : 0;
        more &= !last;
    }
    must((size_t)m->start == start);
}

/* Sent as DATA wants it, given to our own customer, and read from its disk again: the same. */
static void check_journey(size_t dotted_len, const char *content, size_t len)
{
    static const char before[] = "EHLO a\r\nMAIL FROM:<>\r\nRCPT TO:<a@example.com>\r\nDATA\r\n";
    static const char after[] = ".\r\nQUIT\r\n";
    static uint8_t script[PEER_MAX + 256];
    struct customer c = {.name = "example.org", .queue = QUEUE_FD, .quiet = true, .domains = ""};
    struct session *s = new_session(CUSTOMER);
    size_t n = sizeof before - 1, files_before = file_count;
    if (dotted_len > 60000 || memchr(content, 0xfb, len) || memchr(content, 0xfc, len) || memchr(content, 0xfd, len) ||
        memchr(content, 0xfe, len))
        return;
    memcpy(script, before, n);
    memcpy(script + n, said, dotted_len);
    memcpy(script + n + dotted_len, after, sizeof after - 1);
    peer_says(script, n + dotted_len + sizeof after - 1);
    said_len = 0;
    if (take_mail_ourselves(s, &c) == EX_OK) {
        const struct file *f = &files[files_before];
        must(file_count == files_before + 1 && f->there && f->len >= len &&
             memcmp(f->data + f->len - len, content, len) == 0);
    } else {
        must(memmem(said, said_len, "554 5.4.6", 9)); /* it has too many Received fields */
    }
}

/* Who has got the message is struck out in the file; the others, and all else, stay what they were. */
static void check_striking_out(struct message *m, const char *content, size_t len, unsigned deliver)
{
    struct message again;
    size_t left;
    for (size_t i = 0; i < m->recipients; i++)
        if (m->list[i].fate == OWED && deliver >> i % 6 & 1)
            m->list[i].fate = DELIVERED;
    left = list_owed(m, recipients[0], sizeof recipients[0]);
    must(message_strike_out(m) == UPDATED);
    if (message_claim(&again, QUEUE_FD, MESSAGE) == CLAIMED) {
        must(list_owed(&again, recipients[1], sizeof recipients[1]) == left && left > 0);
        must(strcmp(recipients[0], recipients[1]) == 0 && strcmp(m->sender, again.sender) == 0);
        must(again.wire_size == m->wire_size && again.eight_bit == m->eight_bit);
        must(again.size == m->size && again.start == m->start);
        must(memcmp(file_named(MESSAGE)->data + again.start, content, len) == 0);
    } else {
        must(again.held && left == 0);
    }
    message_close(&again);
}

static void fuzz_message(void)
{
    static char wire[PEER_MAX * 3];
    struct session *s = new_session(PROVIDER);
    unsigned o = option(), deliver = option();
    struct message m;
    read_piece = (o & 3) * (o & 3) * 7;
    put_file(MESSAGE, (const char *)input, input_len);
    show_queue(QUEUE_FD, NULL, 0, true, NULL); /* queue -l: it lists whatever lies there, and prints nothing raw */
    if (message_claim(&m, QUEUE_FD, MESSAGE) == CLAIMED) {
        const char *content = (const char *)input + m.start;
        size_t len = input_len - (size_t)m.start;
        check_start(&m, (const char *)input, input_len);
        must(m.recipients > 0 && list_owed(&m, recipients[0], sizeof recipients[0]) > 0);
        must(sender_valid(m.sender));
        must(message_send(&m, &s->io, false) && stream_flush(&s->io));
        must(said_len == m.wire_size && said_len == to_wire(wire, content, len, false));
        must(memcmp(said, wire, said_len) == 0);
        said_len = 0;
        must(message_send(&m, &s->io, true) && stream_flush(&s->io));
        must(said_len == to_wire(wire, content, len, true) && memcmp(said, wire, said_len) == 0);
        if (o & 4) {
            size_t n = 0;
            for (size_t i = 0; i < len; i++) {
                bool crlf = content[i] == '\r' && i + 1 < len && content[i + 1] == '\n';
                wire[n++] = content[i] == '\r' ? '\n' : content[i];
                i += crlf;
            }
            if (n > 0 && wire[n - 1] != '\n')
                wire[n++] = '\n';
            check_journey(said_len, wire, n);
        }
        if (o & 8)
            check_striking_out(&m, content, len, deliver);
    } else {
        must(m.held);
    }
    message_close(&m);
    stream_close(&s->io);
}

/* ---- accounts: the file, and the verifiers in it ---- */

static void check_account(const struct accounts *all, size_t i)
{
    const struct account *a = &all->list[i];
    struct verifier v, again;
    char text[256], salt[BASE64_SIZE(SALT_MAX) + 1], stored_key[64], server_key[64];
    must(a->name[0] && a->secret[0] && !strpbrk(a->name, ":\r\n") && !strpbrk(a->secret, "\r\n") && a->name[0] != '#');
    must(i == 0 || strcmp(all->list[i - 1].name, a->name) < 0);
    must(account_find(all, a->name) == a);
    for (const char *p = a->domains; *p; p++)
        must(islower((unsigned char)*p) || isdigit((unsigned char)*p) || strchr(".-,", *p));
    must(strchr(a->domains, '.') && !strstr(a->domains, ".."));
    if (strncmp(a->secret, SCRAM_SCHEME, strlen(SCRAM_SCHEME)) != 0)
        return;
    must(account_verifier(a, &v));
    must(v.iterations >= SCRAM_ITERATIONS_LEAST && v.iterations <= SCRAM_ITERATIONS_MOST);
    must(v.salt_len > 0 && v.salt_len <= SALT_MAX);
    base64_encode(salt, v.salt, v.salt_len);
    base64_encode(stored_key, v.keys.stored, 32);
    base64_encode(server_key, v.keys.server, 32);
    snprintf(text, sizeof text, "%d,%s,%s,%s", v.iterations, salt, stored_key, server_key);
    must(verifier_parse(text, &again) && again.iterations == v.iterations && again.salt_len == v.salt_len);
    must(memcmp(again.salt, v.salt, v.salt_len) == 0 && memcmp(again.keys.stored, v.keys.stored, 32) == 0 &&
         memcmp(again.keys.server, v.keys.server, 32) == 0);
    must(isdigit((unsigned char)a->secret[strlen(SCRAM_SCHEME)]));
}

static void fuzz_accounts(void)
{
    struct text t = {(const char *)input, input_len}, line;
    struct accounts *all;
    size_t lines = 0;
    char why[256] = "";
    FILE *file = input_len ? fmemopen((void *)input, input_len, "r") : NULL;
    if (!file)
        return;
    all = accounts_read(file, "accounts", why, sizeof why);
    fclose(file);
    while (cut_line(&t, &line))
        lines += line.at[0] != '#' && line.at[0] != '\r' && line.at[0] != '\n';
    must((all == NULL) == starts_with(why, strlen(why), "accounts:"));
    must(!all || (all->count == lines && t.len == 0));
    for (size_t i = 0; all && i < all->count; i++)
        check_account(all, i);
    accounts_release(all);
}

/* ---- base64: there and back, and nothing but the one way of writing it ---- */

static int sextet(char c)
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    const char *at = c ? strchr(digits, c) : NULL;
    return at ? (int)(at - digits) : -1;
}

/* RFC 4648, by hand. -1: it is none; bits that padding leaves over may be anything. */
static ssize_t slow_decode(char *out, const char *text)
{
    size_t len = strlen(text), n = 0;
    if (len % 4)
        return -1;
    for (size_t i = 0; i < len; i += 4) {
        bool end = i + 4 == len;
        int pad = !end || text[i + 3] != '=' ? 0 : text[i + 2] == '=' ? 2 : 1, bits = 0;
        for (int k = 0; k < 4 - pad; k++) {
            if (sextet(text[i + (size_t)k]) < 0)
                return -1;
            bits |= sextet(text[i + (size_t)k]) << (18 - 6 * k);
        }
        for (int k = 0; k < 3 - pad; k++)
            out[n++] = (char)(bits >> (16 - 8 * k) & 255);
    }
    return (ssize_t)n;
}

static void fuzz_base64(void)
{
    static char text[8192], decoded[8192], slow[8192], encoded[BASE64_SIZE(4096) + 1];
    size_t n, small = option() * 4;
    ssize_t got, wanted;
    input_len = input_len < 4096 ? input_len : 4096;
    memcpy(text, input, input_len);
    text[input_len] = '\0';
    got = base64_decode(decoded, sizeof decoded, text);
    wanted = slow_decode(slow, text);
    must(got == wanted && (got < 0 || (memcmp(decoded, slow, (size_t)got) == 0 && decoded[got] == '\0')));
    if (got >= 0) {
        char *tight = malloc(small + 1); /* AddressSanitizer knows where it ends */
        ssize_t fits = base64_decode(tight, small + 1, text);
        must(fits == got || (fits == -1 && strlen(text) / 4 * 3 > small));
        free(tight);
    }
    n = base64_encode(encoded, input, input_len);
    must(n == strlen(encoded) && n == BASE64_SIZE(input_len));
    must(base64_decode(decoded, sizeof decoded, encoded) == (ssize_t)input_len &&
         memcmp(decoded, input, input_len) == 0);
}

/* ---- relay: what passes through --smtp and --exec, cut in any way ---- */

/* PAUSE changes the speaker; the octet behind it, how many come at once. */
static void follow_all(struct relay *r, const uint8_t *data, size_t len, size_t at_once)
{
    enum side who = PROVIDER;
    for (size_t i = 0; i < len;) {
        size_t n = 0;
        if (data[i] == PAUSE) {
            who = other_side(who);
            i++;
            continue;
        }
        while (i + n < len && n < at_once && data[i + n] != PAUSE)
            n++;
        follow(r, who, (const char *)data + i, n);
        i += n;
    }
}

static void fuzz_relay(void)
{
    static struct relay whole, parts;
    struct session *s = new_session(CUSTOMER);
    unsigned o = option(), at_once = option() + 1;
    s->trace = (o & 3) != 3 ? TRACE_OFF : o & 32 ? TRACE_LADDER : TRACE_RFC;
    memset(&whole, 0, sizeof whole);
    memset(&parts, 0, sizeof parts);
    whole.s = parts.s = s;
    follow_all(&whole, input, input_len, input_len);
    follow_all(&parts, input, input_len, at_once);
    must(whole.messages == parts.messages && whole.quit == parts.quit && whole.count == parts.count);
    must(whole.data.under_way == parts.data.under_way && whole.data.state == parts.data.state);
    must(whole.octets == parts.octets && whole.chunk == parts.chunk);
    must(memcmp(whole.len, parts.len, sizeof whole.len) == 0 && whole.count <= PASSING_MAX);
    for (size_t i = 0, replies = 0; i <= input_len; i++) {
        replies += i < input_len && input[i] == '2';
        must(i < input_len || whole.messages <= replies);
    }
}

/* ---- enqueue: any message on standard input, for one domain or two; queue -l lists what came of it ---- */

static void check_enqueued(const char *path, const char *recipient, const char *content, size_t len)
{
    struct message m;
    const char *start;
    must(message_claim(&m, QUEUE_FD, path) == CLAIMED);
    must(m.recipients == 1 && strcmp(m.list[0].address, recipient) == 0 && strcmp(m.sender, "ned@example.edu") == 0);
    start = file_named(path)->data + m.start;
    if ((size_t)(m.size - m.start) != len) /* a Received field keeps the envelope apart from the message */
        must(starts_with(start, (size_t)(m.size - m.start), "Received: by host (odmr enqueue);\n\t"));
    must((size_t)(m.size - m.start) >= len);
    must(memcmp(file_named(path)->data + m.size - (off_t)len, content, len) == 0);
    message_close(&m);
}

static void fuzz_enqueue(void)
{
    char *recipients[] = {"eva@example.org", "\"q @\"@example.com"};
    int count = 1 + (int)(option() & 1);
    char first[COPY_SIZE] = "", *newline; /* what is looked at for mbox's From line */
    const char *content;
    size_t len;
    fails_at = option() & 4 ? option() : 0;
    if (input_len == 0)
        return;
    content = (const char *)input;
    len = input_len;
    memcpy(first, content, len < sizeof first - 1 ? len : sizeof first - 1);
    newline = strchr(first, '\n');
    if (strncmp(first, "From ", 5) == 0 && newline && first[5 + strspn(first + 5, " \t")] != ':') {
        len -= (size_t)(newline + 1 - first);
        content += newline + 1 - first;
    }
    input_file = fmemopen((void *)(uintptr_t)input, input_len, "r");
    if (enqueue(QUEUE_FD, "ned@example.edu", "host", recipients, count) == EX_OK) {
        fails_at = 0;
        must(file_count == (size_t)count);
        for (int i = 0; i < count; i++)
            check_enqueued(files[i].path, recipients[i], content, len);
    } else {
        must(disk_failed);
        for (size_t i = 0; i < file_count; i++)
            must(!files[i].there);
    }
    fclose(input_file);
    fails_at = 0;
    show_queue(QUEUE_FD, NULL, 0, true, NULL);
}

/* ---- networks: --allow's text, and which addresses are in it ---- */

static bool bit_of(const unsigned char *octets, int i)
{
    return octets[i / 8] >> (7 - i % 8) & 1;
}

/* The options are an address, as one of IPv4 if the first is odd; the input is the text. */
static void fuzz_networks(void)
{
    static const unsigned char mapped[12] = "\0\0\0\0\0\0\0\0\0\0\xff\xff";
    unsigned char address[16], base[16] = {0};
    char text[128], *slash, *end = NULL;
    bool as_ipv4 = option() & 1, valid, inside = true, four;
    struct network n;
    unsigned long bits;
    for (int i = 0; i < 16; i++)
        address[i] = (unsigned char)(option() << 4 | (option() & 15));
    if (as_ipv4)
        memcpy(address, mapped, sizeof mapped);
    snprintf(text, sizeof text, "%.*s", (int)(input_len < 100 ? input_len : 100), (const char *)input);
    valid = network_parse(&n, text);

    slash = strchr(text, '/');
    if (slash)
        *slash++ = '\0';
    four = inet_pton(AF_INET, text, base + 12) == 1;
    if (four)
        memcpy(base, mapped, sizeof mapped);
    bits = slash && isdigit((unsigned char)*slash) ? strtoul(slash, &end, 10) : four ? 32 : 128;
    must(valid == (strlen(text) < 64 && (four || inet_pton(AF_INET6, text, base) == 1) &&
                   (!slash || (end && *end == '\0' && end - slash <= 3)) && bits <= (four ? 32 : 128)));
    if (!valid)
        return;
    bits += four ? 96 : 0;
    for (int i = 0; i < (int)bits; i++)
        inside = inside && bit_of(base, i) == bit_of(address, i);
    if (!four && bits < 96 && memcmp(address, mapped, sizeof mapped) == 0)
        inside = false;
    must(network_has(&n, address) == inside);
}

/* ---- The program ---- */

static const struct {
    const char *name;
    void (*run)(void);
} targets[] = {
    {"provider", fuzz_provider}, {"sender", fuzz_sender},     {"receiver", fuzz_receiver},
    {"customer", fuzz_customer}, {"sasl", fuzz_sasl},         {"message", fuzz_message},
    {"accounts", fuzz_accounts}, {"base64", fuzz_base64},     {"relay", fuzz_relay},
    {"networks", fuzz_networks}, {"enqueue", fuzz_enqueue},
};
static void (*target)(void);

static void read_accounts(void)
{
    static char text[] = "example.org:example.org,example.com:tanstaaf\n"
                         "other:other.example:another secret: with colons\n"
                         "scram:example.org:{SCRAM-SHA-256}4096,MDEyMzQ1Njc4OWFiY2RlZg==,"
                         "WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=,wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU=\n";
    char why[256];
    FILE *file = fmemopen(text, sizeof text - 1, "r");
    the_provider.accounts = accounts_read(file, "accounts", why, sizeof why);
    fclose(file);
    must(the_provider.accounts);
}

/* A certificate for example.org and other@example.com, signed by itself. Nothing depends on its key. */
static void make_certificate(void)
{
    EVP_PKEY *key = EVP_EC_gen("P-256");
    X509V3_CTX context;
    X509_EXTENSION *names;
    the_certificate = X509_new();
    X509V3_set_ctx(&context, NULL, the_certificate, NULL, NULL, 0);
    names = X509V3_EXT_conf_nid(NULL, &context, NID_subject_alt_name, "DNS:example.org,email:other@example.com");
    must(the_certificate && names && X509_add_ext(the_certificate, names, -1));
    must(X509_set_pubkey(the_certificate, key) && X509_sign(the_certificate, key, EVP_sha256()));
    X509_EXTENSION_free(names);
    EVP_PKEY_free(key);
}

const char *__asan_default_options(void);
int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Memory that was freed comes back soon, or each execution would touch fresh pages. */
const char *__asan_default_options(void)
{
    return "quarantine_size_mb=1:malloc_context_size=8";
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    const char *name = strrchr((*argv)[0], '/');
    (void)argc;
    name = name ? name + 1 : (*argv)[0];
    for (size_t i = 0; i < sizeof targets / sizeof *targets; i++)
        if (strcmp(name, targets[i].name) == 0)
            target = targets[i].run;
    if (!target) {
        dprintf(STDERR_FILENO, "%s: no target has this name\n", name);
        exit(EX_USAGE);
    }
    log_file = fopencookie(NULL, "w", (cookie_io_functions_t){.write = log_write});
    setvbuf(log_file, NULL, _IOFBF, 65536);
    the_provider.name = "example.net";
    the_provider.queue = QUEUE_FD;
    the_provider.wake_fd = WAKE_FD;
    the_provider.login_timeout = 60;
    the_provider.sendmail = "/usr/sbin/sendmail";
    pthread_mutex_init(&the_provider.lock, NULL);
    read_accounts();
    make_certificate();
    make_tls_bio_method(); /* as the first context would */
    write_letters();
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input = data;
    input_len = size;
    world_begins();
    target();
    world_ends();
    return 0;
}

#pragma clang attribute pop
