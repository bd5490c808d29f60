/* A model of odmr.c for the model checker spin. "make model" checks it; README, "The model", says what that shows.
 *
 * Read it beside odmr.c. A process, a label or an inline has the name of the function that it models, and does the same
 * in the same order, without the octets. An id in a comment, such as 5.2.1-f, is a requirement of RFC2645.txt.
 *
 * A test sees the runs that happen. A model checker makes every run: at each step it tries each process that can move,
 * each open branch of an "if", and each fault. An assert is therefore checked in every run that reaches it.
 *
 * One step is one "atomic", or one statement outside of any. Nothing comes between the statements of an atomic, unless
 * it has to wait. Each writes to the line or to a disk once, as its last effect. What comes before that is only seen by
 * the process itself, so a fault in the middle is the same as a fault before or after.
 *
 * The sizes, each set by a -D option of spin:
 *
 *   SESSIONS           customers of one account; each has a connection and a thread of the provider
 *   MESSAGES           in the queue at the start, each for RECIPIENTS
 *   POLLS              how often each customer connects; 0: without end
 *   FAULTS             how often the line of the first customer is cut, one of its sides is killed and started again,
 *                      or the provider's machine loses power after it has removed a file
 *   OFFERS             what the customer's EHLO offers, any of: 1 nothing, 2 PIPELINING, 4 CHUNKING too
 *   VERDICTS           what the customer says to RCPT and to the last octet, any of: 1 2xx, 2 4xx, 4 5xx
 *   REPLIES_IN_FLIGHT  as in odmr.c: the most replies that the sender leaves outstanding
 *   REPLY_ROOM         replies that fit into the buffers on the way to the provider
 *   MAIL_ROOM          the same on the way to the customer, in commands and parts of content
 *   ANY_CLIENT         commands of a client that sends any of them, in any order, without waiting; 0: a proper customer
 *   LOGIN              0: connections begin after AUTH, which spares states where two sessions meet
 *   LIVENESS           adds the property that all mail arrives; RECIPIENTS must be 1
 *   MUTANT_...         a defect on purpose, to see that a property can fail; grep MUTANT lists them
 *
 * Not modelled: octets and line ends, TLS, the steps of a SASL exchange, time-outs (a wait ends when the peer answers
 * or closes, or the line is cut), replies to MAIL other than 250, a disk that fails, other programs in the queue,
 * --interval, --max-age. The customer forgets the transaction when BDAT is refused for want of recipients. */

#ifndef SESSIONS
#define SESSIONS 1
#endif
#ifndef MESSAGES
#define MESSAGES 2
#endif
#ifndef RECIPIENTS
#define RECIPIENTS 1
#endif
#ifndef POLLS
#define POLLS 2
#endif
#ifndef FAULTS
#define FAULTS 0
#endif
#ifndef OFFERS
#define OFFERS 4
#endif
#ifndef VERDICTS
#define VERDICTS 1
#endif
#ifndef REPLIES_IN_FLIGHT
#define REPLIES_IN_FLIGHT 4
#endif
#ifndef REPLY_ROOM
#define REPLY_ROOM 4
#endif
#ifndef MAIL_ROOM
#define MAIL_ROOM 2
#endif
#ifndef ANY_CLIENT
#define ANY_CLIENT 0
#endif

#ifndef LOGIN
#define LOGIN 1
#endif

#define ANSWERS_MAX 4 /* of the customer, that wait for the disk */

/* Domains are bits. The account has two. With three messages, the n-th is for the n-th domain; else all are for ORG. */
#define ORG 1
#define COM 2
#define OTHER 4
#define ACCOUNT_DOMAINS (ORG | COM)
#define domain_of(m) (MESSAGES < 3 -> ORG : 1 << (m))

#define NONE MESSAGES /* no message */
#define bit(n) (1 << (n))
#define entry(m, r) ((m) * RECIPIENTS + (r)) /* of a recipient, in arrays for all messages */

/* Commands and parts of content. LAST has the last octet of a message: the final dot, or the end of BDAT's octets; with
 * BDAT its first octets are in the same part as the command. NOISE is a command that the provider does not know. */
mtype = { EHLO, AUTH, ATRN, NOISE, QUIT, MAIL, RCPT, DATA, BDAT, CONTENT, LAST };
/* Replies, by their codes. A greeting is 220. */
mtype = { _220, _221, _235, _250, _354, _4xx, _450, _451, _453, _502, _503, _530, _535, _5xx };
#define RIGHT_SECRET 1 /* argument of AUTH */
#define REVERSING 9    /* argument of 250: "OK now reversing the connection" */

mtype = { CLAIMED, BUSY, NOTHING };         /* enum claim */
mtype = { END_OF_MESSAGE, NO_MORE_MAIL };   /* steps of the sender that write nothing */
/* enum verdict. STRUCK_OUT: settled in an earlier session. */
#define STRUCK_OUT 0
#define OWED 1
#define ACCEPTED 2
#define DELIVERED 3
#define DEFERRED 4
#define REFUSED 5
#define RETURNED 6

/* ==== What outlives the processes ====================================================================== */

bool file[MESSAGES];                /* the name is in the provider's queue */
byte owed[MESSAGES];                /* its recipients that are not struck out, as bits */
byte unflushed;                     /* messages that were removed, as bits; on disk they may still be there */
#ifdef MUTANT_STRIKE_OUT_WITHOUT_FSYNC
byte owed_on_disk[MESSAGES];        /* 0: as in owed */
#endif
byte claimed[MESSAGES];             /* flock(2) on the file, by session + 1; 0: nobody. It ends with its holder */
byte copies[MESSAGES * RECIPIENTS]; /* in a customer's Maildir, and flushed */
bool told[MESSAGES * RECIPIENTS];   /* the sender has a failure notice */
byte polls[SESSIONS];

/* ==== The line =========================================================================================
 *
 * A channel for each direction. Its room is what the buffers of both kernels hold, and a side that writes into a full
 * one waits. After a cut each side reads as much of what was on its way as arrives, then the end. What it writes is
 * lost. */

chan to_customer[SESSIONS] = [MAIL_ROOM] of { mtype, byte };
chan to_provider[SESSIONS] = [REPLY_ROOM] of { mtype, byte };
bool up[SESSIONS];
bool connected[SESSIONS];           /* a thread of the provider serves it */
bool provider_closed[SESSIONS], customer_closed[SESSIONS]; /* that side writes no more */
bool provider_killed[SESSIONS], customer_killed[SESSIONS]; /* that side is to start again */

/* In the memory of one side. struct sender: the replies that are due, each as its command and the recipient's number.
 * struct smtp_server: the answers that wait for the disk, each as its code, the message, and the recipients, as bits,
 * that it is a promise for. */
chan fifo[SESSIONS] = [REPLIES_IN_FLIGHT] of { mtype, byte };
chan answers[SESSIONS] = [ANSWERS_MAX] of { mtype, byte, byte };

/* ==== The referee ======================================================================================
 *
 * It notes what has happened, from the outside. Neither side reads these; the asserts do. */

bool proved[SESSIONS];              /* a right secret has come on this connection */
byte requested[SESSIONS];           /* the domains of its last ATRN, as they came; 0: none were named */
byte turns[SESSIONS];               /* how often its roles have turned */
byte sending[MESSAGES];             /* the session that sends it + 1 */
byte reply_due[MESSAGES];           /* the session + 1 that has sent the last octet and has not acted on the reply */
byte excuses[MESSAGES];             /* faults that came while a reply was due, or that undid the removal */

/* 4-e: for each recipient a message is in the queue, or at the customer, or its sender has been told. */
#define has_a_place(m, r) ((file[m] && (owed[m] & bit(r))) || copies[entry(m, r)] > 0 || told[entry(m, r)])
inline nothing_is_lost(c)
{
    for (i : 0 .. RECIPIENTS - 1) {
        assert(has_a_place(c, i))
    }
    i = 0
}

/* One copy; another only for each fault that came while the reply was on its way, or that undid the removal. */
#define copies_are_excused(m, r) (copies[entry(m, r)] <= 1 + excuses[m])

/* At MAIL: AUTH and ATRN have succeeded, the domain is the account's (5.2.1-e) and was asked for (5.2.1-a), and no
 * other session sends the same message. */
inline may_be_sent(c)
{
    assert(proved[s] && turns[s] == 1);
    assert(domain_of(c) & ACCOUNT_DOMAINS);
    assert(requested[s] == 0 || (domain_of(c) & requested[s]));
    assert(sending[c] == 0);
    sending[c] = s + 1
}

/* ==== Reading and writing ==============================================================================
 *
 * "verb", "argument" and "broken" are the reader's own. */

inline send_to_customer(word, value)
{
    if
    :: up[s] && !customer_closed[s] && nfull(to_customer[s]) -> to_customer[s]!word,value
    :: !up[s] || customer_closed[s] -> skip /* into the void; the next read will show it */
    fi
}

inline send_to_provider(word, value)
{
    if
    :: up[s] && !provider_closed[s] && nfull(to_provider[s]) -> to_provider[s]!word,value
    :: !up[s] || provider_closed[s] -> skip
    fi
}

inline read_from_customer()
{
    if
    :: to_provider[s]?verb,argument
    :: !up[s] -> broken = true; verb = 0
    :: up[s] && customer_closed[s] && empty(to_provider[s]) -> broken = true; verb = 0
    fi
}

inline read_from_provider()
{
    if
    :: to_customer[s]?verb,argument
    :: !up[s] -> broken = true; verb = 0
    :: up[s] && provider_closed[s] && empty(to_customer[s]) -> broken = true; verb = 0
    fi
}

/* ==== The provider ==================================================================================== */

/* Three steps, because another session may act between them: message_open(), flock(2) in claim_file(), and the second
 * look there. It asks whether the name still leads to the file, which the other session may have removed before our
 * flock(2). */
inline message_claim()
{
    if
    :: file[m] ->
        if
#ifdef MUTANT_CLAIM_WITHOUT_LOCK
        :: true -> claimed[m] = s + 1;
#else
        :: atomic { claimed[m] == 0 -> claimed[m] = s + 1 }
#endif
            atomic {
                if
#ifdef MUTANT_CLAIM_WITHOUT_SECOND_LOOK
                :: true ->
#else
                :: file[m] ->
#endif
                    got = CLAIMED;
                    for (i : 0 .. RECIPIENTS - 1) { /* envelope_read() */
                        fate[entry(m, i)] = (owed[m] & bit(i) -> OWED : STRUCK_OUT)
                    }
                    i = 0
                :: else -> claimed[m] = 0
                fi
            }
        :: else -> got = BUSY
        fi
    :: else -> skip /* NOTHING: it is gone */
    fi
}

/* Claims the oldest message of the backlog that can be claimed, into m. */
inline claim_next()
{
    do
    :: atomic { got != CLAIMED && backlog ->
            m = 0;
            do
            :: !(backlog & bit(m)) -> m++
            :: else -> break
            od;
            backlog = backlog & ~bit(m)
        }
        message_claim()
    :: got == CLAIMED || !backlog -> break
    od
}

/* take_asked_domains(), backlog_read(). Names only: a message that is listed here may be gone when it is claimed. */
inline list_backlog()
{
    backlog = 0;
    if
#ifndef MUTANT_ATRN_FOR_A_FOREIGN_DOMAIN
    :: argument & ~ACCOUNT_DOMAINS -> got = 0 /* 5.2.1-e: no mail, also of the account's own domains */
#endif
    :: else ->
        got = NOTHING;
        argument = (argument -> argument : ACCOUNT_DOMAINS); /* 5.2.1-a, 5.2.1-d */
        for (i : 0 .. MESSAGES - 1) {
            backlog = backlog | (file[i] && (argument & domain_of(i)) -> bit(i) : 0)
        }
        i = 0
    fi
}

/* 5.2.1-f, 5.2.1-j, 5.2.1-k, 5.2.1-g */
#define atrn_reply() (got == 0 -> _450 : (got == CLAIMED -> _250 : (got == BUSY -> _451 : _453)))

/* 5.1.1-a, 5.4-a: replies to other commands than AUTH, ATRN and QUIT. */
#define common_reply() (verb == EHLO -> _250 : _502)

/* update_queue() and message_close(): each change of the disk is a step. */
inline message_conclude()
{
    d_step { ready != NONE ->
        for (i : 0 .. RECIPIENTS - 1) {
            if
            :: fate[entry(ready, i)] == ACCEPTED || fate[entry(ready, i)] == OWED ||
               fate[entry(ready, i)] == DEFERRED ->
                left = left | bit(i)
            :: fate[entry(ready, i)] == DELIVERED -> served = served | bit(i)
            :: fate[entry(ready, i)] == REFUSED -> /* return_refused(): the notice goes first */
                told[entry(ready, i)] = true;
                served = served | bit(i)
            :: else -> skip
            fi
        }
        i = 0
    }
    d_step {
        if
        :: served && !left -> /* message_remove(): the directory is not flushed */
            file[ready] = false;
            unflushed = unflushed | bit(ready)
        :: served && left -> /* message_strike_out(): flushed, and the claim stays */
#ifdef MUTANT_STRIKE_OUT_WITHOUT_FSYNC
            owed_on_disk[ready] = owed[ready];
#endif
            owed[ready] = left
        :: else -> skip
        fi;
        nothing_is_lost(ready)
    }
    d_step { /* message_close() */
        claimed[ready] = 0;
        sending[ready] = 0;
        reply_due[ready] = (reply_due[ready] == s + 1 -> 0 : reply_due[ready]);
        for (i : 0 .. RECIPIENTS - 1) {
            fate[entry(ready, i)] = 0
        }
        i = 0; served = 0; left = 0; ready = NONE
    }
}

/* Nothing of it is being written, and no reply to it is outstanding. */
inline transaction_release(c)
{
    if
    :: outstanding[c] == 0 && !(open && c == m) -> ready = c
    :: else -> skip
    fi
}

/* What the reply in verb says of the oldest command: take_rcpt_reply(), take_content_reply(). A 2xx to the last octet
 * passes the responsibility to the customer (4-e). */
inline take_reply()
{
    d_step {
        fifo[s]?what,whose;
        if
        :: what == RCPT -> fate[whose] = (verb == _250 -> ACCEPTED : (verb == _5xx -> REFUSED : DEFERRED))
        :: what == DATA && verb == _354 -> go_ahead = true
        :: (what == DATA && verb != _354) || what == LAST ->
            for (i : 0 .. RECIPIENTS - 1) {
                if
                :: fate[whose + i] == ACCEPTED ->
                    fate[whose + i] = (verb == _250 -> DELIVERED : (verb == _5xx -> REFUSED : DEFERRED))
                :: else -> skip
                fi
            }
            i = 0
        :: else -> skip /* MAIL, QUIT */
        fi;
        if
        :: what != QUIT ->
            outstanding[whose / RECIPIENTS]--;
            transaction_release(whose / RECIPIENTS)
        :: else -> skip
        fi;
        what = 0; whose = 0
    }
}

/* Notes that the command just written will be answered. may_stay_outstanding() is the one rule: how many replies may be
 * left outstanding after it. */
inline expect()
{
    d_step {
        fifo[s]!step,entry(m, r);
        outstanding[m] = outstanding[m] + (step == QUIT -> 0 : 1);
        if
        :: !pipelining || step == DATA || step == QUIT -> may_stay = 0
        :: else -> may_stay = (len(fifo[s]) < REPLIES_IN_FLIGHT -> len(fifo[s]) : REPLIES_IN_FLIGHT / 2)
        fi
    }
}

/* await_replies(may_stay); and take_arrived_replies(), which is called between two messages. */
#define replies_are_read() (len(fifo[s]) > may_stay || \
                            (step == END_OF_MESSAGE && len(fifo[s]) > 0 && len(to_provider[s]) > 0))

/* Has the customer taken a recipient of the message? */
#if RECIPIENTS == 1
#define accepted() (fate[m] == ACCEPTED)
#else
#define accepted() (fate[entry(m, 0)] == ACCEPTED || fate[entry(m, 1)] == ACCEPTED)
#endif

/* send_transaction(): what follows step, which is done and whose replies are read as far as they must be. */
inline next_step()
{
    d_step {
        if
        :: step == 0 -> step = MAIL
        :: step == MAIL || step == RCPT ->
            r = (step == MAIL -> 0 : r + 1); /* next_owed() */
            do
            :: r < RECIPIENTS && fate[entry(m, r)] != OWED -> r++
            :: else -> break
            od;
            if
            :: r < RECIPIENTS -> step = RCPT
            :: else ->
                r = 0;
                if
                :: len(fifo[s]) == 0 && !accepted() -> step = END_OF_MESSAGE /* nobody wants it: no content */
                :: else -> step = (chunking -> BDAT : DATA)
                fi
            fi
        :: step == DATA -> step = (go_ahead -> CONTENT : END_OF_MESSAGE); go_ahead = false
        :: step == BDAT || step == CONTENT -> step = LAST
        :: step == LAST -> step = END_OF_MESSAGE
        :: else -> step = QUIT /* after NO_MORE_MAIL */
        fi
    }
}

proctype provider_session(byte s)
{
    mtype verb, got, what, step;
    byte argument, backlog, m, r, i, whose, served, left, may_stay, ready = NONE;
    byte fate[MESSAGES * RECIPIENTS], outstanding[MESSAGES];
    bool broken, pipelining, chunking, go_ahead, open;

end_listener: { /* 4-a; here a process may wait without end */
    connected[s];

#if LOGIN
initial_state: /* 5.1 */
    atomic { send_to_customer(_220, 0) }
    do
    :: atomic {
            read_from_customer();
            if
            :: broken -> goto close
            :: verb == AUTH && argument == RIGHT_SECRET ->
                proved[s] = true;
                send_to_customer(_235, 0);
                break /* 5.1.2-b: once the reply has been sent; 5-a */
            :: verb == AUTH && argument != RIGHT_SECRET -> send_to_customer(_535, 0)
            :: verb == ATRN ->
#ifdef MUTANT_ATRN_BEFORE_AUTH
                break
#else
                send_to_customer(_530, 0) /* 5.2.1-b */
#endif
            :: verb == QUIT -> send_to_customer(_221, 0); goto close /* 5.1.3-a */
            :: else -> send_to_customer(common_reply(), 0)
            fi
        }
    od;
#endif

authenticated_state: /* 5.2 */
    do
    :: atomic {
            read_from_customer();
            if
            :: broken -> goto close
            :: verb == ATRN -> requested[s] = argument; list_backlog()
            :: verb == AUTH -> send_to_customer(_503, 0) /* 5.2-a */
            :: verb == QUIT -> send_to_customer(_221, 0); goto close /* 5.1.3-a */
            :: else -> send_to_customer(common_reply(), 0)
            fi
        }
        if
        :: verb == ATRN ->
atrn_command:
            if
            :: got != 0 -> claim_next()
            :: else -> skip
            fi;
            atomic {
                send_to_customer(atrn_reply(), (got == CLAIMED -> REVERSING : 0));
                if
                :: got == CLAIMED -> break
                :: else -> got = 0
                fi
            }
        :: else -> skip
        fi
    od;

reversed_state: /* 5.3, 5.3-a: the provider is the client now */
    atomic {
        turns[s]++;
        assert(turns[s] == 1);
greet_customer: /* 5.3-b, 5.3-c */
        read_from_customer();
        if
        :: verb == _220 -> send_to_customer(EHLO, 0)
        :: else -> broken = true
        fi
    }
    atomic {
        if
        :: !broken -> read_from_customer()
        :: else -> skip
        fi;
        if
        :: !broken && verb == _250 -> pipelining = argument > 0; chunking = argument > 1
        :: else -> broken = true
        fi;
        open = true; /* the message that was claimed for ATRN (5.2.1-j) */
        verb = 0; argument = 0
    }

    do
    :: (broken || (step == QUIT && !replies_are_read())) && ready == NONE -> break
    :: message_conclude()
    :: atomic { !broken && ready == NONE && replies_are_read() ->
await_replies:
            read_from_customer();
            if
            :: verb == _221 || verb == _250 || verb == _354 || verb == _4xx || verb == _503 || verb == _5xx ->
                take_reply()
            :: else -> broken = true /* the end, or no reply */
            fi;
            verb = 0; argument = 0
        }
    :: atomic { !broken && ready == NONE && !replies_are_read() && step != END_OF_MESSAGE && step != QUIT ->
send_transaction:
            next_step();
            if
            :: step == MAIL -> may_be_sent(m); send_to_customer(MAIL, m); expect()
            :: step == RCPT -> send_to_customer(RCPT, entry(m, r)); expect()
            :: step == DATA -> send_to_customer(DATA, m); expect()
            :: step == BDAT -> send_to_customer(BDAT, m) /* RFC 3030 */
            :: step == CONTENT -> send_to_customer(CONTENT, m)
            :: step == LAST ->
                send_to_customer(LAST, m);
                reply_due[m] = (up[s] && !customer_closed[s] -> s + 1 : 0);
                expect();
#ifdef MUTANT_UNLINK_BEFORE_250
                file[m] = false;
                nothing_is_lost(m)
#endif
            :: step == END_OF_MESSAGE -> open = false; transaction_release(m)
            :: step == QUIT -> send_to_customer(QUIT, 0); expect() /* 5-b */
            fi
        }
    :: atomic { !broken && ready == NONE && !replies_are_read() && step == END_OF_MESSAGE -> got = NOTHING }
next_message:
        claim_next();
        atomic {
            open = (got == CLAIMED);
            step = (open -> 0 : NO_MORE_MAIL);
            m = (open -> m : 0);
            got = 0;
#ifdef MUTANT_QUIT_BEFORE_THE_LAST_REPLY
            if
            :: !open -> send_to_customer(QUIT, 0); step = QUIT
            :: else -> skip
            fi
#else
            may_stay = (open -> may_stay : 0) /* when the customer hears QUIT, the queue shows what it took */
#endif
        }
    od;

abandon: /* recipients whose replies did not come stay in the queue, and the claims end */
#ifndef MUTANT_CLAIM_OUTLIVES_ITS_SESSION
    do
    :: message_conclude()
    :: atomic { ready == NONE ->
            m = 0;
            do
            :: m < MESSAGES && claimed[m] != s + 1 -> m++
            :: else -> break
            od;
            if
            :: m < MESSAGES -> ready = m
            :: else -> break
            fi
        }
    od;
#endif
#ifdef MUTANT_ROLES_TURN_TWICE
    atomic { broken = false; goto authenticated_state }
#endif

close: /* stream_close() */
    skip
    } unless { provider_killed[s] };

    atomic { /* the thread has ended, or the program was killed and started again: nothing in memory is left */
        d_step {
            do
            :: fifo[s]?what,whose
            :: empty(fifo[s]) -> break
            od;
            for (i : 0 .. MESSAGES * RECIPIENTS - 1) {
                fate[i] = 0
            }
            for (i : 0 .. MESSAGES - 1) {
                outstanding[i] = 0
            }
            verb = 0; got = 0; what = 0; step = 0; argument = 0; backlog = 0; m = 0; r = 0; i = 0; whose = 0;
            served = 0; left = 0; may_stay = 0; ready = NONE;
            broken = false; pipelining = false; chunking = false; go_ahead = false; open = false;
            provider_killed[s] = false;
            provider_closed[s] = true;
            connected[s] = false
        }
        goto end_listener
    }
}

/* ==== The customer ===================================================================================== */

/* On disk, renamed into new, and the directory on disk: 250 is a promise. What a power failure in the middle leaves is
 * what one before or after it leaves, so this is one step. */
inline deliveries_store()
{
    d_step {
        n = len(answers[s]);
        do
        :: n > 0 ->
            answers[s]?code,m,whom;
            for (i : 0 .. RECIPIENTS - 1) {
                copies[entry(m, i)] = copies[entry(m, i)] + (whom & bit(i) -> 1 : 0);
                assert(copies_are_excused(m, i))
            }
            i = 0;
            answers[s]!code,m,0;
            n--
        :: else -> break
        od;
        code = 0; m = 0; whom = 0
    }
}

inline forget_answers()
{
    do
    :: answers[s]?code,m,whom
    :: empty(answers[s]) -> break
    od;
    code = 0; m = 0; whom = 0
}

/* All messages that were received go to disk together, then their answers leave. */
inline store_then_answer()
{
#ifdef MUTANT_250_BEFORE_FSYNC
    n = len(answers[s]);
    do
    :: atomic { n > 0 ->
            answers[s]?code,m,whom;
            answers[s]!code,m,whom;
            send_to_provider(code, 0);
            n--
        }
    :: n == 0 -> break
    od;
    atomic { deliveries_store(); forget_answers() }
#else
    do
    :: atomic { nempty(answers[s]) ->
            answers[s]?code,m,whom;
            send_to_provider(code, 0);
            code = 0; m = 0
        }
    :: empty(answers[s]) -> break
    od
#endif
}

/* At once if no other answer waits, else in its turn. */
inline answer(word)
{
    if
    :: empty(answers[s]) -> send_to_provider(word, 0)
    :: nempty(answers[s]) -> answers[s]!word,0,0
    fi
}

/* The customer's opinion of a recipient or a message. */
inline choose()
{
    if
#if VERDICTS & 1
    :: true -> verdict = _250
#endif
#if VERDICTS & 2
    :: true -> verdict = _4xx
#endif
#if VERDICTS & 4
    :: true -> verdict = _5xx
#endif
    fi
}

/* receive_command(): a command or a part of content, in verb. */
inline receive_command()
{
    if
    :: verb == EHLO -> /* hello_command(): the first command, so no answer waits yet */
        if
#if OFFERS & 1
        :: send_to_provider(_250, 0)
#endif
#if OFFERS & 2
        :: send_to_provider(_250, 1)
#endif
#if OFFERS & 4
        :: send_to_provider(_250, 2)
#endif
        fi
    :: verb == MAIL -> current = argument; answer(_250)
    :: verb == RCPT -> /* rcpt_command() */
        choose();
        taken = taken | (verdict == _250 -> bit(argument - entry(current, 0)) : 0);
        answer(verdict)
    :: verb == DATA -> answer((taken -> _354 : _503)) /* data_command() */
    :: verb == BDAT || verb == CONTENT -> skip /* read_content(), into a file in tmp */
    :: verb == LAST -> /* end_content(): the only place that takes responsibility */
        choose();
        if
        :: !taken -> answer(_503)
        :: taken && verdict == _250 -> answers[s]!_250,current,taken /* answer_when_stored() */
        :: else -> answer(verdict)
        fi;
        taken = 0; current = 0 /* forget_transaction() */
    :: verb == QUIT -> answer(_221); done = true /* 5-b */
    :: else -> broken = true
    fi;
    verb = 0; argument = 0; verdict = 0
}

proctype customer_session(byte s)
{
    mtype verb, code, verdict;
    byte argument, current, taken, m, i, n, whom, tries;
    bool broken, done;

end_poll: { /* here a process may wait without end */
    atomic { !connected[s] && (POLLS == 0 || polls[s] < POLLS) -> /* connect_to() */
        polls[s] = polls[s] + (POLLS == 0 -> 0 : 1);
        do
        :: to_customer[s]?verb,argument
        :: empty(to_customer[s]) -> break
        od;
        do
        :: to_provider[s]?verb,argument
        :: empty(to_provider[s]) -> break
        od;
        verb = 0; argument = 0;
        proved[s] = !LOGIN; requested[s] = 0; turns[s] = 0;
        provider_closed[s] = false; customer_closed[s] = false; up[s] = true; connected[s] = true
    }

client_dialogue: /* 4-b */
#if ANY_CLIENT
    do
    :: atomic { tries < ANY_CLIENT ->
            tries++;
            if
            :: send_to_provider(EHLO, 0)
            :: send_to_provider(AUTH, RIGHT_SECRET)
            :: send_to_provider(AUTH, 0)
            :: send_to_provider(ATRN, 0)
            :: send_to_provider(ATRN, COM)
            :: send_to_provider(ATRN, OTHER)
            :: send_to_provider(ATRN, ORG | OTHER)
            :: send_to_provider(NOISE, 0)
            :: send_to_provider(QUIT, 0)
            fi
        }
    :: atomic { nempty(to_customer[s]) ->
            read_from_provider();
            if
            :: argument == REVERSING -> break
            :: else -> skip
            fi
        }
    :: tries == ANY_CLIENT -> goto close
    od;
    atomic { verb = 0; argument = 0; tries = 0 }
#else
#if LOGIN
    atomic { read_from_provider(); send_to_provider(EHLO, 0) }
client_authenticate:
    atomic { read_from_provider(); send_to_provider(AUTH, RIGHT_SECRET) }
    atomic { read_from_provider() }
#endif
client_atrn:
    atomic { send_to_provider(ATRN, 0) }
    atomic {
        read_from_provider();
        if
        :: argument == REVERSING -> verb = 0; argument = 0
        :: else -> send_to_provider(QUIT, 0); read_from_provider(); goto close
        fi
    }
#endif

receive_mail: /* 5.3-a, 5.3-b: the customer is the server now */
    atomic { send_to_provider(_220, 0) }
    do
    :: atomic { nempty(answers[s]) && (empty(to_customer[s]) || full(answers[s]) || done) -> /* before_reading() */
#ifndef MUTANT_250_BEFORE_FSYNC
            deliveries_store()
#endif
        }
        store_then_answer()
    :: atomic { !done && !broken && (empty(answers[s]) || (nempty(to_customer[s]) && nfull(answers[s]))) ->
            read_from_provider();
            receive_command()
        }
    :: broken || (done && empty(answers[s])) -> break
    od;

close: /* the messages without a 250 are discarded */
    skip
    } unless { customer_killed[s] };

    atomic {
        d_step {
            forget_answers();
            verb = 0; verdict = 0; argument = 0; current = 0; taken = 0; i = 0; n = 0; tries = 0;
            broken = false; done = false;
            customer_killed[s] = false;
            customer_closed[s] = true
        }
        goto end_poll
    }
}

/* ==== The start, and the faults ======================================================================== */

inline line_is_lost(c)
{
    d_step {
        up[c] = false;
        for (i : 0 .. MESSAGES - 1) {
            if
            :: reply_due[i] == c + 1 -> excuses[i]++; reply_due[i] = 0
            :: else -> skip
            fi
        }
        i = 0
    }
}

/* All sessions and claims of the provider end. A removal that was not flushed is undone, or it is on disk, because the
 * kernel flushes by itself at times. */
inline provider_loses_power()
{
    for (n : 0 .. MESSAGES - 1) {
        if
        :: unflushed & bit(n) ->
            file[n] = true;
            excuses[n] = excuses[n] + (reply_due[n] -> 0 : 1) /* the lost line excuses the reply */
#ifdef MUTANT_STRIKE_OUT_WITHOUT_FSYNC
        :: owed_on_disk[n] -> owed[n] = owed_on_disk[n]
#endif
        :: true -> skip
        fi;
        claimed[n] = 0; sending[n] = 0
    }
    unflushed = 0;
    for (n : 0 .. SESSIONS - 1) {
        line_is_lost(n);
        provider_killed[n] = connected[n]
    }
    n = 0
}
#ifdef MUTANT_STRIKE_OUT_WITHOUT_FSYNC
#define power_matters() (unflushed || owed_on_disk[0])
#else
#define power_matters() unflushed /* else the failure ends sessions only, as a kill does */
#endif

init
{
    byte i, n, faults;
    atomic {
        for (i : 0 .. MESSAGES - 1) {
            file[i] = true;
            owed[i] = bit(RECIPIENTS) - 1
        }
        for (i : 0 .. SESSIONS - 1) {
            customer_closed[i] = true;
            provider_closed[i] = true;
            run provider_session(i);
            run customer_session(i)
        }
        i = 0;
        do /* any number of faults, up to FAULTS */
        :: faults < FAULTS -> faults++
        :: break
        od
    }
end_faults:
    do
    :: faults == 0 -> break
    :: atomic { faults > 0 && up[0] && (connected[0] || !customer_closed[0]) -> /* a cut */
            faults--;
            line_is_lost(0)
        }
    :: atomic { faults > 0 && connected[0] && !provider_killed[0] -> /* SIGKILL for the provider: its claims end */
            faults--;
            line_is_lost(0);
            for (i : 0 .. MESSAGES - 1) {
                if
                :: claimed[i] == 1 -> claimed[i] = 0; sending[i] = 0
                :: else -> skip
                fi
            }
            i = 0;
            provider_killed[0] = true
        }
    :: atomic { faults > 0 && power_matters() -> /* a power failure of the provider */
            faults--;
            provider_loses_power()
        }
    :: atomic { faults > 0 && !customer_closed[0] && !customer_killed[0] -> /* a power failure of the customer */
            faults--;
            line_is_lost(0);
            customer_killed[0] = true
        }
    od
}

#ifdef LIVENESS
/* When faults end, all mail arrives. */
#define settled(m) (copies[m] > 0 || told[m])
ltl all_mail_arrives { <> (settled(0) && settled(MESSAGES - 1)) }
#endif
