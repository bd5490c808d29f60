#!/usr/bin/env bash
# The test suite of odmr.
#
#   ./test_odmr.sh              run all tests, several at a time (JOBS=8)
#   ./test_odmr.sh NAME...      run the named tests
#   ./test_odmr.sh --list       list each test with the requirements that it shows
#   ./test_odmr.sh --provider HOST:PORT ...    judge any provider, requirement by requirement
#   ./test_odmr.sh --customer COMMAND ...      judge any customer; see "Judging another implementation" in README
#   ./test_odmr.sh --torture    cut, kill and fail sessions, and play hostile peers; see .ci/torture
#   ./test_odmr.sh --help       print these lines
#
# The tests follow the order of RFC 2645, then of the other standards, then of the program's parts. grep '# ----' lists
# the headings. A test is a function t_NAME. If a test shows requirements of RFC2645.txt, NAME begins with an id, and a
# comment "# shows: ID..." above the function lists all ids. Each test runs in its own shell with a scratch directory
# $T. A test fails by calling fail. All processes that a test has started end with the test. ODMR names the program
# under test. The tests listen and connect only on 127.0.0.1 and ::1.

set -u
export LC_ALL=C
unset ODMR_SECRET COLUMNS
self=$0
[[ $self == /* && ! -L $self ]] || self=$(readlink -f "$0")
here=${self%/*}
ODMR=${ODMR:-$here/odmr}
[[ $ODMR == /* ]] || ODMR=$(readlink -f "$ODMR")
JOBS=${JOBS:-8}
PATIENCE=${PATIENCE:-20}   # seconds that one operation may take

# ---- Helpers: what every test may use ----------------------------------------------------------------
#
# The tests spend most of their time on starting processes, so functions that are called often start none.
#
# What functions pass to each other without an argument has a name in capitals. A test sets these, often for one call:
#   ODMR JOBS PATIENCE        the program under test; tests at a time; seconds that one operation may take
#   OVER_TLS                  if not empty, sessions with the provider and the scripted provider go over TLS
#   UNTRACED                  if not empty, provider and run start our programs without --trace
#   AROUND                    the command that provider puts before the program, as in AROUND=(prlimit --nofile=30)
#   LETTER                    if not empty, the subject of the message that put writes; put_letter sets it
#   OFFER ANSWERS             the keywords of take_mail's EHLO response; its replies that differ from the default
#   CLIENTS                   if not empty, the options of socat by which serve, over TLS, verifies clients
#   SIDE LINE_OUT             the side that the test plays, C or P; the descriptor that it writes to, if not LINE
# Functions set these for the test:
#   T SCRATCH STARTED         the test's directory; the parent of T; the processes that end with the test
#   LINE HEARD ANSWER         the open connection; the last line read from it; the last reply, its lines joined by |
#   WANTED SEEN TO_COME       the dialogue as expected, as seen, and the part not yet reached
#   PROVIDER LOG N_PROVIDERS  process and log of the latest provider; the number of providers so far
#   PORT TLS_PORT PORTS       the provider's port; its port of implicit TLS; all ports in the log that listens read last
#   N_TRACES                  the number of customers' traces that this shell has written
#   N_GOT ENVELOPE ACCEPTED   take_mail: messages taken; the envelope and accepted recipients of the present message
#   CONTENT LACKING FAULT     content, lacking_capabilities and fault: the result
#   COMPUTED COMPUTING_SHELL  compute: the result; the shell that COMPUTER, the computing process, belongs to
#   RESPONSE                  cram_response: the result
#   PROOF_OF_IT SIGNATURE STORED_KEY SERVER_KEY    scram: the results
#   NOISE SINK SERVER         ports of noise and sink; the command that runs the program of perl_server
# Constants:
#   CAPABILITY OTHER_SIDE MOMENT    capabilities by name; the peer of SIDE; the time at the start of a line of the log

fail() {
    echo "FAILED: $*" >&2
    dialogue_seen >&2
    [ ! -s "${T:-}/peer.failed" ] || echo "the scripted provider: $(cat "$T/peer.failed")" >&2
    exit 1
}
skip() { echo "$*" > "$T/skipped"; exit 77; }
needs() {
    local p; for p; do PATH=$PATH:/usr/sbin:/sbin command -v "$p" > /dev/null || skip "$p is not installed"; done
}
# needs_capabilities THING NAME...: skips the test if one of these capabilities(7) is missing. THING needs them.
declare -A CAPABILITY=([CHOWN]=0 [SETUID]=7 [SYS_CHROOT]=18 [SYS_ADMIN]=21 [MKNOD]=27 [NET_RAW]=13)
lacking_capabilities() {
    local name key mask=0
    while read -r key name; do [ "$key" != CapEff: ] || mask=$((16#$name)); done < /proc/self/status
    LACKING=
    for name; do ((mask >> CAPABILITY[$name] & 1)) || LACKING+=" CAP_$name"; done
}
needs_capabilities() {
    lacking_capabilities "${@:2}"
    [ -z "$LACKING" ] || skip "without${LACKING} there is no $1"
}
# needs_namespaces FLAGS THING: skips the test if unshare(1) cannot make the namespaces of these flags.
needs_namespaces() {
    local why
    why=$(unshare "$1" true 2>&1) && return
    lacking_capabilities SYS_ADMIN
    skip "${LACKING:+without$LACKING }$2 cannot be had (unshare $1: ${why#unshare: })"
}

# content FILE: reads FILE into CONTENT. moment [SECONDS]: pauses, for 0.03 seconds by default.
content() { CONTENT=; [ ! -e "$1" ] || IFS= read -r -d '' CONTENT < "$1" || true; }
moment() { [ -n "${NEVER:-}" ] || exec {NEVER}<> <(:); IFS= read -r -t "${1:-0.03}" <&"$NEVER"; }

equal() { [ "$1" = "$2" ] || fail "${3:-not equal}: \"$1\" is not \"$2\""; }
match() { [[ $1 =~ $2 ]] || fail "${3:-no match}: \"$1\" does not match $2"; }
matches() { content "$1"; match "${CONTENT%$'\n'}" "${@:2}"; }
has() { grep -q -e "$2" "$1" || { cat "$1" >&2; fail "$1 has no line like $2"; }; }
hasnt() { ! grep -q -e "$2" "$1" || { cat "$1" >&2; fail "$1 has a line like $2"; }; }
same() { cmp "$1" "$2" >&2 || fail "$1 and $2 differ${3:+: $3}"; }

# until_true COMMAND...: repeats the command until it succeeds. The test fails after PATIENCE seconds of pauses.
until_true() {
    local n
    for ((n = 0; n < PATIENCE * 33; n++)); do
        if "$@" > /dev/null 2>&1; then return 0; fi
        moment
    done
    fail "waited in vain for: $*"
}

reachable() { local line; { exec {line}<> "/dev/tcp/127.0.0.1/$1"; } 2> /dev/null && exec {line}>&-; }
# shows FILE REGEX: true if FILE has a match. counted N REGEX FILE: true if exactly N lines match.
shows() { content "$1"; [[ $CONTENT =~ $2 ]]; }
counted() {
    local line n=0
    while IFS= read -r line; do if [[ $line =~ $2 ]]; then n=$((n + 1)); fi; done < "$3"
    [ "$n" = "$1" ]
}

# run CODE COMMAND...: runs the program and checks its exit code. The output is in $T/out and $T/err. Our customer
# writes a trace, which lawful_sessions checks after the test. The trace is in $T/err only if COMMAND has --trace.
run() {
    local wanted=$1 code=0
    shift
    if [[ "$1 ${2:-}" == "$ODMR customer" && -z ${UNTRACED:-}${ODMR_MUTANT:-} ]]; then run_traced "$@"
    else "$@" > "$T/out" 2> "$T/err"; fi || code=$?
    [ "$code" = "$wanted" ] || { cat "$T/out" "$T/err" >&2; fail "exit $code, not $wanted, from: $*"; }
}
run_traced() {
    local code=0 trace=$T/.customer.$BASHPID.${N_TRACES:=0} hidden='^\[[0-9]+\] (--|[PC]:) '
    N_TRACES=$((N_TRACES + 1))
    if [[ " $* " == *' --trace'* ]]; then hidden='^$'; else set -- "$1" "$2" --trace "${@:3}"; fi
    "$@" > "$T/out" 2> "$trace" || code=$?
    grep -vE "$hidden" "$trace" > "$T/err"
    return "$code"
}

# in_a_network COMMAND...: runs the command in a network of its own, which has only 127.0.0.1 and ::1.
in_a_network() {
    unshare -n bash -c \
        'perl -e '"'"'socket S, 2, 2, 0; $up = pack "a16sx14", "lo", 1; ioctl S, 0x8914, $up or die $!'"'"'; "$@"' \
        - "$@"
}

# variant EDIT: sets ODMR to our program with this edit of sed in odmr.c and odmr.h, for a limit that is too long for a
# test. The edit must change something.
variant() {
    local file dir=$T/variant
    mkdir "$dir"
    for file in odmr.c odmr.h; do sed "$1" "$here/$file" > "$dir/$file"; done
    ! cat "$dir"/odmr.[ch] | cmp -s - <(cat "$here"/odmr.[ch]) || fail "the edit changes nothing: $1"
    ODMR=$dir/odmr
    ${CC:-cc} -std=gnu11 -O0 -w -o "$ODMR" "$dir/odmr.c" -lssl -lcrypto -pthread || fail 'the variant does not compile'
}

# fault FUNCTION N ERROR FROM: sets FAULT to the words before a command that make the N-th call of FUNCTION, counted
# from the first call of FROM, fail with ERROR (.ci/fail.c).
fault() {
    FAULT=(env FAIL="$1" FAIL_AT="$2" FAIL_ERRNO="$3" FAIL_FROM="$4" FAIL_LOG="$T/fired")
    [ -n "${WRAPPED:-}" ] || FAULT+=("LD_PRELOAD=$here/build/fail.so")
    : > "$T/fired"
}

rss() { awk '/^VmHWM/ { print $2 }' "/proc/$1/status"; }

none() { [ -z "$2" ] || fail "$1: ${2//$'\n'/ }"; }

# ---- A provider, with one account for two domains ----

accounts() {
    umask 077
    printf '%s\n' 'example.org:example.org,example.com:tanstaaf' '# a comment' \
        'other:other.example:another secret: with colons' > "$T/accounts"
    umask 022
}

AROUND=()
# provider [OPTION...]: starts a provider on a free port with the queue $T/queue; sets PORT and PROVIDER. The provider
# writes a trace into its log, which lawful_sessions checks after the test.
provider() {
    local log=$T/provider${N_PROVIDERS:=0}.log sendmail=$T/sendmail option sockets=0
    N_PROVIDERS=$((N_PROVIDERS + 1))
    [ -d "$T/queue" ] || mkdir "$T/queue"
    [ -f "$T/accounts" ] || accounts
    [[ " $* " != *' --user nobody '* ]] || chown nobody "$T/accounts"
    [[ -n ${UNTRACED:-}${ODMR_MUTANT:-} || " $*" == *' --trace'* ]] || set -- --trace "$@"
    if [ -n "${OVER_TLS:-}" ]; then
        [ -f "$T/server.pem" ] || authority
        [[ " $* " != *' --user nobody '* ]] || chown nobody "$T/server.pem"
        set -- --cert "$T/server.pem" --tls-listen 127.0.0.1:0 "$@"
    else
        set -- -l 127.0.0.1:0 "$@"
    fi
    [ -f "$T/sendmail" ] || sendmail=$SCRATCH/sendmail
    "${AROUND[@]}" "$ODMR" provider -q "$T/queue" -a "$T/accounts" -n example.net --sendmail "$sendmail" "$@" \
        2>> "$log" &
    PROVIDER=$!
    LOG=$log
    STARTED+=("$PROVIDER")
    for option; do [[ $option != -l && $option != --tls-listen ]] || sockets=$((sockets + 1)); done
    until_true listens "$log" "$sockets"
    PORT=${PORTS[0]}
    if [ -n "${OVER_TLS:-}" ]; then TLS_PORT=$PORT; tunnel; fi
}

# The start of a line of the provider's log: the local time in the format of RFC 3339.
MOMENT='[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}[+-][0-9]{2}:[0-9]{2}'

# listens LOG [N]: sets PORTS to the ports that LOG says are listened on. False while there are fewer than N, or none.
listens() {
    local line
    PORTS=()
    while IFS= read -r line; do
        if [[ $line =~ listening\ on\ .*:([0-9]+)$ ]]; then PORTS+=("${BASH_REMATCH[1]}"); fi
    done < "$1"
    [ ${#PORTS[@]} -ge "${2:-1}" ]
}

# Writes the sendmail program that takes the provider's notices. If $T/sendmail exists, that runs instead. If
# $T/sendmail.exit exists, the program exits with the code in that file. Otherwise it writes $T/notice.N, with its
# arguments on the first line.
sendmail_stub() {
    printf '%s\n' '#!/bin/bash' 'cd "$T" || exit 75' '[ ! -e sendmail ] || exec ./sendmail "$@"' \
        '[ ! -e sendmail.exit ] || exit "$(cat sendmail.exit)"' 'n=1' \
        'until ( set -C; { printf "%q " "$@"; echo; cat; } > "notice.$n" ) 2> /dev/null; do n=$((n + 1)); done' \
        > "$SCRATCH/sendmail"
    chmod 755 "$SCRATCH" "$SCRATCH/sendmail"
}
# how_many PATTERN...: prints the number of files that match.
how_many() { shopt -s nullglob; eval "set -- $*"; shopt -u nullglob; echo $#; }
notices() { how_many '"$T"/notice.*'; }
# over LEAST: true if the provider has ended all its sessions, and at least LEAST. settled: true if it has ended all.
over() {
    local ended begun
    content "$LOG"
    ended=${CONTENT//' disconnected'/} begun=${CONTENT//' connected'$'\n'/}
    ended=$(((${#CONTENT} - ${#ended}) / 13)) begun=$(((${#CONTENT} - ${#begun}) / 11))
    [ "$ended" -ge "$1" ] && [ "$ended" = "$begun" ]
}
settled() { over 0; }

# Checks that our side keeps to the protocol in the traces of this test. The peer may depart from it.
lawful_sessions() {
    local log files=()
    for log in "$T"/provider*.log; do [ ! -e "$log" ] || files+=(--provider "$log"); done
    for log in "$T"/.customer.*; do [ ! -e "$log" ] || files+=(--customer "$log"); done
    [ ${#files[@]} = 0 ] || "$here/.ci/legal" "${files[@]}" >&2 || fail 'our side departs from the protocol'
}

stop_provider() { kill "$PROVIDER"; wait "$PROVIDER"; equal $? 0 "exit of the provider"; }

# put NAME SENDER RECIPIENT...: puts a message into the queue; its content is standard input.
put() {
    local name=$1 sender=$2 domain r
    shift 2
    domain=${1##*@}
    [ -d "$T/queue/$domain/new" ] || mkdir -p "$T/queue/$domain"/{new,cur,tmp}
    { printf 'Return-Path: <%s>\n' "$sender"
      for r; do printf 'Delivered-To: %s\n' "$r"; done
      if [ -n "$LETTER" ]; then letter "$LETTER"; else cat; fi
    } > "$T/queue/$domain/new/$name"
}
LETTER=
# put_letter SUBJECT NAME SENDER RECIPIENT...: puts a letter with this subject into the queue.
put_letter() { LETTER=$1; shift; put "$@"; LETTER=; }

letter() { printf 'From: a@example.edu\nTo: b@example.org\nSubject: %s\n\nText of %s.\n' "$1" "$1"; }
# put_many N [RECIPIENT [OCTETS]]: puts letters 1 to N into the queue, named 1.a to N.a; %d in RECIPIENT is the number.
# OCTETS is the size of the additional content of each letter.
put_many() {
    [ -d "$T/queue/example.org" ] || mkdir -p "$T/queue/example.org"/{new,cur,tmp}
    perl -e 'my ($dir, $n, $to, $octets) = @ARGV;
        for my $i (1 .. $n) {
            open my $out, ">", "$dir/$i.a" or die; (my $recipient = $to) =~ s/%d/$i/;
            print $out "Return-Path: <a\@example.edu>\nDelivered-To: $recipient\n",
                "From: a\@example.edu\nTo: b\@example.org\nSubject: $i\n\nText of $i.\n",
                ("x" x 70 . "\n") x ($octets / 71); close $out or die;
        }' "$T/queue/example.org/new" "$1" "${2:-eva@example.org}" "${3:-0}"
}
waiting() { how_many '"$T"/queue/*/{,.Undeliverable/}{new,cur}/*'; }

claimable() { flock -n "$1" true; }

unfinished() { how_many '"$T"/queue/*/{,.Undeliverable/}tmp/*'; }

# owed NAME: prints, as words, the recipients of message NAME in example.org that are not struck out.
owed() { sed -n 's/^Delivered-To: \(.*@.*\)$/\1/p' "$T/queue/example.org/new/$1" | xargs; }

# ---- The protocol by hand, over bash's /dev/tcp ----
#
# In all these functions a mismatch fails the test. The judge's functions, whose names begin with judge_, let it report
# a mismatch.

dial() {
    exec {LINE}<> "/dev/tcp/127.0.0.1/${1:-$PORT}" || fail "cannot connect"
    note "-- connected" "-- connected"
}
hang_up() { exec {LINE}>&-; }
say() { note "$SIDE: $*" "$SIDE: $*"; printf '%s\r\n' "$*" >&"${LINE_OUT:-$LINE}"; }
# Reads one line, without its CRLF, into HEARD. False if the connection has ended or PATIENCE is over.
hear() {
    IFS= read -r -t "$PATIENCE" HEARD <&"$LINE" || { note '' "(nothing)"; return 1; }
    note '' "${OTHER_SIDE[$SIDE]}: ${HEARD%$'\r'}"
    [ "${HEARD%$'\r'}" != "$HEARD" ] || fail "a line without CR: $HEARD"
    HEARD=${HEARD%$'\r'}
}
# expect REGEX [WHY]: reads a whole reply, which must match REGEX with its lines joined by |.
expect() {
    local all=
    while :; do
        hear || {
            WANTED[-1]="${OTHER_SIDE[$SIDE]}: (like $1)"
            fail "the connection ended, but expected $1"
        }
        WANTED[-1]="${OTHER_SIDE[$SIDE]}: (like $1)"
        all+=${all:+|}$HEARD
        [[ $HEARD == ???-* ]] || break
    done
    ANSWER=$all
    match "$all" "$1" "${2:-reply}"
}
ask() { say "$1"; expect "$2"; }
# ask_raw COMMAND CODE [CLAUSE]: sends the command, with printf's escapes resolved, and expects a reply with this code.
ask_raw() {
    note "$SIDE: $1" "$SIDE: $1"
    printf '%b\r\n' "$1" >&"${LINE_OUT:-$LINE}"
    expect "^$2[ -]" "the reply to \"$1\"${3:+ ($3)}"
}

# dialogue: plays one side of the session that standard input has in the notation of RFC 2645, 6. The test sends the
# lines of its own side ($SIDE, C or P) and compares the peer's lines with those of the other side. If the test is C:
#   C: EHLO example.org     sends this line, with printf's escapes resolved; \c at its end: without CRLF
#   P: 250-*                the provider's line matches this pattern of bash; * is any text
#   P: ...                  any lines of the same reply, up to one that matches the next line
#   P: (content)            the lines of a message, with the dot that ends it
#   P: (closes)             the provider closes the connection
#   C: (waits 2 s)          pauses
dialogue() {
    local script n line text any=
    mapfile -t script
    ANSWER=
    for n in "${!script[@]}"; do
        line=${script[n]} text=${script[n]:3}
        TO_COME=("${script[@]:n + 1}")
        case $line in
        "$SIDE: (closes)") hang_up; note "$line" "$line" ;;
        "$SIDE: (waits "*) text=${text#(waits }; moment "${text% s)}" ;;
        "$SIDE:"*) note "$line" "$line"; printf '%b\r\n' "$text" >&"${LINE_OUT:-$LINE}" ;;
        ?': (closes)') note "$line" ''; closed; SEEN[-1]=$line ;;
        ?': ...') any=yes ;;
        ?': (content)') while [ "$HEARD" != . ]; do hear || fail 'the content did not end'; WANTED[-1]=$line; done ;;
        ?:*)
            while :; do
                [[ $ANSWER == *"|" ]] || ANSWER=
                hear || { WANTED[-1]=$line; fail "the connection ended, but expected $line"; }
                ANSWER+=$HEARD
                [[ $HEARD != ???-* ]] || ANSWER+="|"
                # shellcheck disable=SC2053
                if [[ $HEARD == $text ]]; then WANTED[-1]=$line; break; fi
                [[ -n $any && $HEARD == ???-* ]] || { WANTED[-1]=$line; fail "not what was expected: $line"; }
                WANTED[-1]="${line:0:1}: ..."
            done
            any= ;;
        *) fail "no line of a dialogue: $line" ;;
        esac
    done
    [ -z "$any" ] || fail 'a dialogue ends with ...'
    TO_COME=()
}
# open_session [NAME]: connects and sends EHLO NAME. dialogue_on_a_new_connection: connects, then plays a dialogue.
open_session() { dial; expect '^220 '; ask "EHLO ${1:-x}" '^250'; }
dialogue_on_a_new_connection() { dial; dialogue; }

# note EXPECTED SEEN: adds a line to the dialogue that fail prints.
note() {
    WANTED+=("${1:0:200}") SEEN+=("${2:0:200}")
    ((${#SEEN[@]} < 400)) || SEEN=("${SEEN[@]: -40}") WANTED=("${WANTED[@]: -40}")
}
SIDE=C WANTED=() SEEN=() TO_COME=()
declare -A OTHER_SIDE=([C]=P [P]=C)
# Prints the last lines of the dialogue, expected on the left and seen on the right. The line that failed has a >.
dialogue_seen() {
    local n mark=' ' last=$((${#SEEN[@]} - 1))
    [ "$last" -ge 0 ] || return 0
    printf '  %-56s %s\n' 'expected' 'seen'
    for ((n = last < 24 ? 0 : last - 24; n <= last; n++)); do
        [ "$n" != "$last" ] || mark='>'
        printf '%s %-56s %s\n' "$mark" "${WANTED[n]//[^ -~]/?}" "${SEEN[n]//[^ -~]/?}"
    done
    for n in "${!TO_COME[@]}"; do [ "$n" -ge 12 ] || printf '  %s\n' "${TO_COME[n]}"; done
}

# each_row COMMAND [WORD...]: runs the command with the columns of each row of a table on standard input. "|" separates
# the columns. Blanks around a column only align it; \x20 is a blank that belongs to it.
each_row() {
    local row column columns
    while IFS= read -r row; do
        columns=()
        while [ -n "$row" ]; do
            column=${row%%|*}
            if [[ $row == *'|'* ]]; then row=${row#*|}; else row=; fi
            column=${column#"${column%%[! ]*}"}
            columns+=("${column%"${column##*[! ]}"}")
        done
        "$@" "${columns[@]}" < /dev/null
    done
}
closed() {
    local more code=0
    IFS= read -r -t "$PATIENCE" more <&"$LINE" || code=$?
    [ -z "$more" ] && [ "$code" != 0 ] || fail "more came: $more"
    [ "$code" -le 128 ] || fail 'the connection is still open'
}

b64() { printf '%s' "$1" | base64 -w 0; }
unb64() { base64 -d <<< "$1"; }
hmac_md5() { printf '%s' "$2" | openssl dgst -md5 -hmac "$1" | sed 's/.* //'; }
# Closes all descriptors but 0 to 2, so that a long-running process does not hold connections and locks of the test.
closed_but_0_to_2() {
    local fd; for fd in /proc/self/fd/*; do fd=${fd##*/}; [ "$fd" -le 2 ] || eval "exec $fd>&-"; done
}
# compute FUNCTION LINE...: sets COMPUTED to the result of the function. One process computes for the whole shell,
# because starting a process takes longer than computing. A secret may be a real one, so no command line has it.
#   encode TEXT [BASE64]      TEXT and, after it, the decoded BASE64, in base64
#   decode BASE64             the text, without NUL and LF; empty if the argument is not base64
#   cram NAME SECRET CHALLENGE           the response of RFC 2195; the challenge and the response are in base64
#   scram SECRET BARE CHALLENGE FINAL    the proof, signature, StoredKey and ServerKey of RFC 5802, in base64
compute() {
    if [ "${COMPUTING_SHELL:-}" != "$BASHPID" ]; then
        missing "perl's Digest::MD5"
        { coproc COMPUTER { closed_but_0_to_2; exec perl -MDigest::MD5=md5,md5_hex -MDigest::SHA=sha256,hmac_sha256 \
            -MMIME::Base64 -e '
            $| = 1;
            sub base64 { encode_base64($_[0], "") }
            sub encode { my ($text, $more) = @_; base64($text . decode_base64($more // "")) }
            sub decode { $_[0] =~ m{^[A-Za-z0-9+/]*={0,2}[ \t]*$} ? decode_base64($_[0]) =~ tr/\0\n//dr : "" }
            sub cram {
                my ($name, $key, $challenge) = @_;
                $key = md5($key) if length $key > 64;
                $key .= "\0" x (64 - length $key);
                my $inner = md5(($key ^ "\x36" x 64) . decode_base64($challenge));
                base64("$name " . md5_hex(($key ^ "\x5c" x 64) . $inner));
            }
            sub scram {
                my ($secret, $bare, $challenge, $final) = @_;
                my ($salt, $count) = $challenge =~ /,s=([^,]*),i=(\d{1,6})\b/ or return "";
                my $salted = my $u = hmac_sha256(decode_base64($salt) . pack("N", 1), $secret);
                for (2 .. $count) { $u = hmac_sha256($u, $secret); $salted ^= $u }
                my ($client, $server) = map { hmac_sha256($_, $salted) } "Client Key", "Server Key";
                my ($stored, $all) = (sha256($client), "$bare,$challenge,$final");
                join " ", map { base64($_) } $client ^ hmac_sha256($all, $stored), hmac_sha256($all, $server),
                    $stored, $server;
            }
            my %function = (encode => \&encode, decode => \&decode, cram => \&cram, scram => \&scram);
            while (defined(my $call = <STDIN>)) {
                my ($name, $lines) = split " ", $call;
                chomp(my @lines = map { scalar <STDIN> } 1 .. $lines);
                print $function{$name}(@lines), "\n";
            }'; } } 2> /dev/null
        COMPUTING_SHELL=$BASHPID
        STARTED+=("$COMPUTER_PID")
    fi
    printf '%s\n' "$1 $(($# - 1))" "${@:2}" >&"${COMPUTER[1]}"
    IFS= read -r -t "$PATIENCE" COMPUTED <&"${COMPUTER[0]}" || fail "$1 could not be computed"
}
# cram_response NAME SECRET CHALLENGE: sets RESPONSE.
cram_response() { compute cram "$@"; RESPONSE=$COMPUTED; }
# auth_cram_md5 NAME SECRET REPLY: authenticates and expects a reply that matches REPLY.
auth_cram_md5() {
    ask 'AUTH CRAM-MD5' '^334 '
    cram_response "$1" "$2" "${ANSWER#334 }"
    ask "$RESPONSE" "$3"
}

# login [NAME SECRET]: greeting, EHLO, AUTH CRAM-MD5.
login() {
    local name=${1:-example.org} secret=${2:-tanstaaf}
    open_session example.org
    auth_cram_md5 "$name" "$secret" "^235 now authenticated as $name\$"
}

silent() { local octet code=0; IFS= read -r -N 1 -t 1.5 octet <&"$LINE" || code=$?; [ "$code" -gt 128 ]; }

served() ( dial; hear && [[ $HEARD == 220* ]] )

# encoded FORMAT: prints the output of printf FORMAT, including NUL octets, in base64.
# shellcheck disable=SC2059
encoded() { printf "$1" | openssl base64 -A; }

# ---- The customer's part by hand: an SMTP server in bash, after ATRN ----
#
# take_mail plays the server until QUIT. OFFER has the keywords of its EHLO response. ANSWERS has the replies that are
# not the default, by whole command or by verb. CONTENT is the reply to the last octet of a message, and CLOSE closes
# the connection. A message that take_mail accepts becomes $T/got/N: the MAIL and RCPT lines, an empty line, and the
# content with its CRLFs. The provider's commands are in $T/heard.

declare -A ANSWERS=()
OFFER=
# answer COMMAND DEFAULT: sends the reply to COMMAND. True if the reply is 2xx, or 3xx to DATA.
answer() {
    local reply=${ANSWERS[$1]:-${ANSWERS[${1%% *}]:-$2}}
    if [ "$reply" = CLOSE ]; then hang_up; return 1; fi
    say "$reply"
    [[ $reply == 2* || ($1 == DATA && $reply == 3*) ]]
}
offer_extensions() {
    local word last=example.org
    for word in $OFFER; do say "250-$last"; last=${word/=/ }; last=${last//;/ }; done
    say "250 $last"
}
take_content() {
    local line content=
    if [[ $HEARD == DATA ]]; then
        answer DATA '354 go on' || return 0
        [[ ${ANSWERS[DATA]:-354} == 354* ]] || return 0
        while IFS= read -r -t "$PATIENCE" line <&"$LINE" && [ "$line" != $'.\r' ]; do content+=${line#.}$'\n'; done
    else
        line=${HEARD#BDAT }
        # bash reads one octet at a time, which is slow on a busy machine
        IFS= read -r -N "${line% LAST}" -t $((PATIENCE * 5)) content <&"$LINE"
    fi
    if [ "$ACCEPTED" = 0 ]; then say '554 no valid recipients'; return 0; fi
    if answer CONTENT '250 OK'; then
        N_GOT=$((N_GOT + 1))
        printf '%s\n%s' "$ENVELOPE" "$content" > "$T/got/$N_GOT"
    fi
}
take_mail() {
    trap '' PIPE # output after the provider has closed the connection is lost
    N_GOT=0 ENVELOPE='' ACCEPTED=0
    [ -d "$T/got" ] || mkdir "$T/got"
    : > "$T/heard"
    answer GREETING '220 example.org ready to receive email' || return 0
    while hear; do
        echo "$HEARD" >> "$T/heard"
        case $HEARD in
        EHLO*) if [ -n "${ANSWERS[EHLO]:-}" ]; then answer EHLO; else offer_extensions; fi ;;
        MAIL*) ACCEPTED=0 ENVELOPE=$HEARD$'\n'; answer "$HEARD" '250 OK' || ENVELOPE= ;;
        RCPT*) if [ -z "$ENVELOPE" ]; then say '503 MAIL first'
               elif answer "$HEARD" '250 OK'; then ENVELOPE+=$HEARD$'\n'; ACCEPTED=$((ACCEPTED + 1)); fi ;;
        DATA | BDAT*) if [ -z "$ENVELOPE" ] && [ "$HEARD" = DATA ]; then say '503 MAIL first'; else take_content; fi ;;
        QUIT) say '221 example.org closing connection'; return 0 ;;
        *) answer "$HEARD" '250 OK' ;;
        esac
        [[ ${ANSWERS[${HEARD%% *}]:-} != CLOSE ]] || return 0
    done
}
# turn [DOMAINS]: logs in, sends ATRN and takes the mail.
turn() { login; ask "ATRN${1:+ $1}" '^250 OK now reversing the connection$'; take_mail; hang_up; }

# wire: prints a message as it is sent: each line end is CRLF, and the message ends with CRLF.
wire() { perl -0777 -pe 's/\r\n|\r|\n/\r\n/g; s/(?<!\n)\z/\r\n/ if length'; }

# customer CODE [OPTION...]: runs our customer, which must exit with CODE. Its mail is in $T/mail, its output in $T/out
# and $T/err.
customer() {
    local code=$1
    shift
    if [ -n "${OVER_TLS:-}" ]; then set -- --tls --ca "$T/ca.crt" "${@/127.0.0.1:$PORT/127.0.0.1:$TLS_PORT}"; fi
    ODMR_SECRET=tanstaaf run "$code" "$ODMR" customer -u example.org -q "$T/mail" -n example.org "$@"
}

# at_ATRN [OFFER]: logs in, sends ATRN, the greeting and the EHLO response. The next line is the provider's first MAIL.
at_ATRN() {
    trap '' PIPE # output after the provider has closed the connection is lost
    OFFER=${1:-}
    login
    ask ATRN '^250 '
    say '220 example.org'
    expect_line '^EHLO '
    offer_extensions
}

# receiver PROGRAM [WORD...]: runs a customer in perl on the open connection, after the 250 to ATRN. PROGRAM can call
# said(LINE), heard(), content(N) and greets(KEYWORD...).
receiver() {
    timeout "$PATIENCE" perl -e 'use strict; use Socket; $SIG{PIPE} = "IGNORE"; binmode STDIN; binmode STDOUT; $| = 1;
        sub said { print "$_[0]\r\n" } sub heard { my $l = <STDIN>; defined $l or exit; $l =~ s/\r\n\z//; $l }
        sub content { my $n = read STDIN, my $d, $_[0]; $n == $_[0] or exit; $d }
        sub greets { said("220 example.org"); heard(); said("250-example.org"); said("250-$_") for @_;
            said("250 8BITMIME") }
        '"$1" "${@:2}" <&"$LINE" >&"$LINE"
}

# ---- A scripted provider, for the customer under test ----
#
# serve FUNCTION: listens (socat) and sets PORT. Each connection runs FUNCTION, which uses say, ask and expect as a test
# does. peer_ok checks that no FUNCTION failed.

serve() {
    needs socat
    local listen=TCP-LISTEN:0
    if [ -n "${OVER_TLS:-}" ]; then
        [ -f "$T/server.pem" ] || authority
        listen=OPENSSL-LISTEN:0,cert=$T/server.pem,${CLIENTS:-verify=0}
    fi
    [ ! -e "$T/socat.log" ] || rm "$T/socat.log" # an older log names a port, too
    socat -d -d "$listen,bind=127.0.0.1,reuseaddr,fork" EXEC:"bash $self --peer $T $1" 2> "$T/socat.log" &
    STARTED+=($!)
    until_true listens "$T/socat.log"
    PORT=${PORTS[0]} TLS_PORT=${PORTS[0]}
}
peer_ok() { [ ! -s "$T/peer.failed" ] || fail 'the scripted provider failed'; }
run_peer() {
    T=$1
    SIDE=P
    exec {LINE}<&0
    LINE_OUT=1
    ( "$2" ) 2> "$T/peer.err.$$" || cat "$T/peer.err.$$" > "$T/peer.failed"
}
# provide [REPLY]: plays the provider up to ATRN and replies to ATRN, with 250 by default. The challenge is
# <1896.697170952@example.net>.
provide() {
    dialogue <<'END'
P: 220 example.net on-demand mail relay server ready
C: EHLO *
P: 250-example.net
P: 250-AUTH EXTERNAL CRAM-MD5
P: 250 ATRN
C: AUTH CRAM-MD5
P: 334 PDE4OTYuNjk3MTcwOTUyQGV4YW1wbGUubmV0Pg==
C: ZXhhbXBsZS5vcmcgNTcxNGI1ZWRmYzIwMWNiOWMwNGRmYjFlY2Y0OWFjZGQ=
P: 235 now authenticated as example.org
END
    expect_line '^ATRN( example.org,example.com)?$'
    say "${1:-250 OK now reversing the connection}"
}
expect_line() {
    hear || {
        WANTED[-1]="${OTHER_SIDE[$SIDE]}: (like $1)"
        fail "the connection ended, but expected $1"
    }
    WANTED[-1]="${OTHER_SIDE[$SIDE]}: (like $1)"
    match "$HEARD" "$1" line
}
# reverse: provide, then the customer's greeting and its response to EHLO.
reverse() { provide; expect '^220 '; ask 'EHLO example.net' '^250'; }
# Parts of a session: up to the response to EHLO, with these mechanisms; from ATRN on; from QUIT on.
offer_mechanisms() {
    say '220 example.net ready'; expect_line '^EHLO '; say '250-example.net'; say "250-AUTH $*"; say '250 ATRN'
}
no_mail() { expect_line '^ATRN$'; say '453 no mail'; goodbye; }
goodbye() { expect_line '^QUIT$'; say '221 bye'; }
mailbox() { how_many "\"\$T\"/mail/${1:-example.org}/new/*"; }
# Prints the content of the only message in the customer's Maildir, without the fields that the customer added.
stored() { sed '1,/^Received: /d' "$T/mail/${1:-example.org}/new"/* | sed '1,2d'; }

store() {
    ask 'MAIL FROM:<a@b.example>' '^250 '; ask "RCPT TO:<$1>" '^250 '; printf 'BDAT 4 LAST\r\nn: 1' >&"$LINE_OUT"
    expect '^250 '
}

# ---- TLS, and SCRAM by hand --------------------------------------------------------------------------

# certificate NAME SUBJECT [SAN [ISSUER [PURPOSE]]]: makes $T/NAME.crt, and $T/NAME.pem with its key. ISSUER signs the
# certificate. Without ISSUER it is self-signed and an authority.
certificate() {
    local kind=FALSE
    [ -n "${4:-}" ] || kind=TRUE
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 -subj "$2" \
        -config <(printf '[req]\ndistinguished_name=dn\n[dn]\n') -addext "basicConstraints=critical,CA:$kind" \
        ${3:+-addext "subjectAltName=$3"} ${5:+-addext "extendedKeyUsage=$5"} ${4:+-CA "$T/$4.crt" -CAkey "$T/$4.pem"} \
        -keyout "$T/$1.pem" -out "$T/$1.crt" 2> "$T/$1.err" || { cat "$T/$1.err" >&2; fail "no certificate $1"; }
    cat "$T/$1.crt" >> "$T/$1.pem"
}
# Copies to $T an authority and a server certificate for localhost and 127.0.0.1. The first caller makes them.
authority() {
    [ -f "$SCRATCH/authority/server.pem" ] ||
        ( flock 9; [ -f "$SCRATCH/authority/server.pem" ] || found_authority ) 9> "$SCRATCH/lock"
    cp "$SCRATCH/authority/"* "$T"
}
found_authority() {
    local T=$SCRATCH/authority.new
    mkdir "$T"
    certificate ca '/CN=Example CA'
    certificate server /CN=example.net DNS:localhost,IP:127.0.0.1 ca
    mv "$T" "$SCRATCH/authority"
}
# tls_provider [OPTION...]: starts a provider with STARTTLS on $PORT and implicit TLS on $TLS_PORT.
tls_provider() {
    [ -f "$T/server.pem" ] || authority
    provider --cert "$T/server.pem" --tls-listen 127.0.0.1:0 "$@"
    until_true listens "$LOG" 2
    TLS_PORT=${PORTS[1]}
}
# tunnel [CERTIFICATE]: sets PORT to a port from which socat connects to $TLS_PORT over TLS.
tunnel() {
    needs socat
    [ ! -e "$T/tunnel.log" ] || rm "$T/tunnel.log"
    socat -d -d TCP-LISTEN:0,bind=127.0.0.1,reuseaddr,fork,backlog=100 \
        "OPENSSL:127.0.0.1:$TLS_PORT,cafile=$T/ca.crt,commonname=localhost${1:+,cert=$1}" 2> "$T/tunnel.log" &
    STARTED+=($!)
    until_true listens "$T/tunnel.log"
    PORT=${PORTS[0]}
}
# noise [OPTION...] PORT: starts a proxy to PORT that adds TLS records without data (.ci/tls.c); sets NOISE.
noise() {
    [ ! -e "$T/noise" ] || rm "$T/noise"
    "$here/build/tls" "${@:1:$#-1}" "127.0.0.1:${*: -1}" > "$T/noise" 2> "$T/noise.err" &
    STARTED+=($!)
    until_true [ -s "$T/noise" ]
    NOISE=$(< "$T/noise")
}

# name_with_nul NAME: prints a DNS name that reads as NAME up to its NUL octet. Only DER can express this name.
name_with_nul() {
    local octets
    octets=$(printf '%s\0.example' "$1" | od -An -v -tx1 | tr -d ' \n')
    printf 'DER:30%02x82%02x%s' $((${#octets} / 2 + 2)) $((${#octets} / 2)) "$octets"
}

external() {
    local code=$1 name=$2; shift 2
    run "$code" "$ODMR" customer --trace --ca "$T/ca.crt" --cert "$T/$name.pem" -q "$T/mail" "$@" "localhost:$PORT"
}

# verifier SECRET ROUNDS: prints a verifier like that of odmr account --scram, but with this number of rounds.
verifier() {
    local salt
    salt=$(b64 'sixteen octets..')
    scram "$1" '' "r=,s=$salt,i=$2" ''
    echo "{SCRAM-SHA-256}$2,$salt,$STORED_KEY,$SERVER_KEY"
}

# scram SECRET BARE CHALLENGE FINAL: computes, in base64, the customer's PROOF_OF_IT, the provider's SIGNATURE, and the
# STORED_KEY and SERVER_KEY of a verifier.
scram() { compute scram "$@"; read -r PROOF_OF_IT SIGNATURE STORED_KEY SERVER_KEY <<< "$COMPUTED"; }

# ---- Receivers that the customer hands the session on to ---------------------------------------------

free_port() {
    local port
    while :; do
        port=$((20000 + RANDOM % 12000))
        ( exec 3<> "/dev/tcp/127.0.0.1/$port" ) 2> /dev/null || break
    done
    echo "$port"
}
# sink [OPTION...]: starts smtp-sink, Postfix's test receiver, which writes what it receives to $T/sink; sets SINK.
sink() {
    local as=(-u nobody -R "$T/sink" -d "%M.")
    needs smtp-sink
    [ "$(id -u)" = 0 ] || as=(-d "$T/sink/%M.") # only root can change the user, and must
    SINK=$(free_port)
    mkdir -p "$T/sink"; chmod 777 "$T/sink"; chmod 755 "$T"
    PATH=$PATH:/usr/sbin smtp-sink "${as[@]}" "$@" "127.0.0.1:$SINK" 100 2> "$T/sink.log" &
    STARTED+=($!)
    until_true reachable "$SINK"
}

# perl_provider END: starts a provider that sends all of $T/batch at once after EHLO; sets PORT. END says what follows:
#   close   the provider closes the connection
#   half    the provider ends its own direction only, and writes the replies to $T/replies
#   stay    the provider waits for the customer to close, and writes the replies to $T/replies
perl_provider() {
    [ ! -e "$T/perl.port" ] || rm "$T/perl.port"
    perl -MIO::Socket::INET -e '
        my ($dir, $end, $s) = @ARGV;
        $SIG{CHLD} = "IGNORE"; $/ = "\n";
        my $listener = IO::Socket::INET->new(LocalAddr => "127.0.0.1", Listen => 9) or die;
        open my $out, ">", "$dir/perl.new" or die; print $out $listener->sockport, "\n"; close $out;
        rename "$dir/perl.new", "$dir/perl.port";
        while ($s = $listener->accept) {
            if (fork) { close $s; next }
            sub hear { my ($want) = @_; while (<$s>) { return if /$want/ } exit }
            syswrite $s, "220 x\r\n"; hear("EHLO");
            syswrite $s, "250-x\r\n250-AUTH CRAM-MD5\r\n250 ATRN\r\n"; hear("AUTH");
            syswrite $s, "334 PDE4OTYuNjk3MTcwOTUyQGV4YW1wbGUubmV0Pg==\r\n"; hear(".");
            syswrite $s, "235 yes\r\n"; hear("ATRN"); select undef, undef, undef, 0.4;
            syswrite $s, "250 OK now reversing the connection\r\n"; hear("^220");
            syswrite $s, "EHLO x\r\n"; hear("^250 ");
            open my $in, "<", "$dir/batch" or die; local $/; my $all = <$in>; syswrite $s, $all;
            exit if $end eq "close";
            shutdown $s, 1 if $end eq "half";
            my $replies = <$s>; open my $to, ">", "$dir/replies.new" or die; print $to $replies; close $to;
            rename "$dir/replies.new", "$dir/replies"; exit;
        }' "$T" "$1" & STARTED+=($!)
    until_true [ -s "$T/perl.port" ]
    PORT=$(< "$T/perl.port")
}
# relay CODE COMMAND [OPTION...]: runs our customer with --exec COMMAND.
relay() {
    ODMR_SECRET=tanstaaf run "$1" "$ODMR" customer -u example.org -n example.org --exec "${@:2}" "127.0.0.1:$PORT"
}
# perl_server [SECONDS]: sets SERVER to a program for --exec that speaks SMTP. The program waits SECONDS before it
# replies to the content of DATA. It writes commands to $T/heard and contents to $T/contents.
perl_server() {
    cat > "$T/server.pl" << 'END'
#!/usr/bin/perl
$| = 1; my ($dir, $pause, $content) = @ARGV;
open my $heard, ">>", "$dir/heard"; open my $kept, ">>", "$dir/contents";
sub answer { print "$_[0]\r\n" }
select((select($heard), $| = 1)[0]);
answer("220 server");
while (<STDIN>) {
    print $heard $_; s/\s+$//; $_ = uc;
    if ($_ eq "DATA") {
        answer("354 go on");
        while (<STDIN>) { last if $_ eq ".\r\n"; print $kept $_ }
        sleep $pause if $pause;
        answer("250 kept");
    } elsif (/^BDAT (\d+)/) { read STDIN, $content, $1; print $kept $content; answer("250 kept") }
    elsif ($_ eq "QUIT") { answer("221 bye"); exit }
    elsif ($_ eq "STARTTLS") { answer("220 go on"); while (<STDIN>) { print "\x17\x03\x03 250 OK\r\n" } exit }
    else { answer(/^EHLO/ ? "250-server\r\n250 STARTTLS" : "250 OK") }
}
print $heard "(end)\n";
END
    SERVER="perl $T/server.pl $T ${1:-0}"
}

# ---- RFC 2645, 4: Description ------------------------------------------------------------------------

# The next functions check a message for eva, bob and zoe after each kind of reply: which recipients are deferred, which
# are named in the sender's notice, and which have the message. The outcome is the same in all three ways of sending.

# outcome DEFERRED NOTICED DELIVERED COMMAND REPLY...: the lists are words in the order of the envelope.
outcome() {
    local owed=$1 noticed=$2 delivered=$3 what=$4
    shift 3
    rm -rf "$T/queue/example.org/new"/* "$T"/notice.* "$T/got"/*
    put_letter outcome 1.a sender@example.edu eva@example.org bob@example.org zoe@example.org
    ANSWERS=()
    while [ $# -gt 0 ]; do ANSWERS[$1]=$2; shift 2; done
    turn
    until_true settled
    named_in 'Final-Recipient: rfc822; ' "$T"/notice.*
    equal "$NAMED" "$noticed" "$OFFER, $what: noticed"
    named_in 'RCPT TO:<' "$T/got"/*
    equal "$NAMED" "$delivered" "$OFFER, $what: delivered"
    named_in 'Delivered-To: ' "$T/queue/example.org/new/1.a"
    equal "$NAMED" "$owed" "$OFFER, $what: owed"
    [ -z "$owed" ] || equal "$OTHERS" "$WHAT_STAYS" 'what stays'
    equal "$(unfinished)" 0 'left in tmp'
}
# named_in PREFIX FILE...: sets NAMED to the local parts in lines that begin with PREFIX, as words, without those that
# are struck out. Sets OTHERS to the other lines.
named_in() {
    local line prefix=$1 file
    shift
    NAMED='' OTHERS=
    for file; do
        [ -f "$file" ] || continue
        while IFS= read -r line; do
            if [[ $line != "$prefix"* ]]; then OTHERS+=$line$'\n'; continue; fi
            [[ $line != *@* ]] || { line=${line#"$prefix"}; NAMED+=${NAMED:+ }${line%%@*}; }
        done < "$file"
    done
}

outcomes() {
    local eva='RCPT TO:<eva@example.org>' bob='RCPT TO:<bob@example.org>' all='eva bob zoe' WHAT_STAYS
    WHAT_STAYS=$(echo 'Return-Path: <sender@example.edu>'; letter outcome)$'\n'
    provider
    outcome '' '' "$all" NOOP 250
    outcome '' "$all" '' MAIL '550 5.7.1 not from there'
    outcome "$all" '' '' MAIL '451 4.3.0 later'
    outcome '' eva 'bob zoe' "$eva" '550 5.1.1 no such user'
    outcome eva '' 'bob zoe' "$eva" '450 4.2.1 mailbox busy'
    outcome bob eva zoe "$eva" '553 no' "$bob" '452 4.2.2 full'
    outcome '' "$all" '' RCPT '550 5.1.1 no such user'
    outcome "$all" '' '' RCPT '451 later'
    outcome eva '' 'bob zoe' "$eva" '552 too many recipients'
    outcome '' "$all" '' CONTENT '554 5.7.1 refused for its content'
    outcome "$all" '' '' CONTENT '452 4.3.1 disk full'
    outcome 'bob zoe' eva '' "$eva" '550 no' CONTENT '452 4.3.1 disk full'
    outcome 'bob zoe' eva '' "$eva" '550 no' CONTENT CLOSE
    outcome "$all" '' '' CONTENT CLOSE
    outcome "$all" '' '' MAIL CLOSE
    outcome "$all" '' '' RCPT CLOSE
    outcome "$all" '' '' MAIL '421 shutting down'
    outcome "$all" '' '' RCPT '421 shutting down'
    outcome "$all" '' '' CONTENT '421 shutting down'
    [[ $OFFER == *CHUNKING* ]] || {
        outcome '' "$all" '' DATA '554 5.5.1 no'
        outcome "$all" '' '' DATA '450 later'
        outcome "$all" '' '' DATA CLOSE
        outcome "$all" '' '' DATA '250 nonsense'
    }
    outcome "$all" '' '' MAIL '354 go on'
    outcome "$all" '' '' RCPT '354 go on'
    outcome eva '' 'bob zoe' "$eva" '354 go on'
    outcome "$all" '' '' CONTENT '354 go on'
    outcome "$all" '' '' CONTENT 'no reply at all'
    outcome "$all" '' '' GREETING '554 no service'
    outcome "$all" '' '' GREETING '450 later'
}

# The provider listens on port 366 of every address and the customer connects to port 366, unless an option names
# another port (RFC 2645, 4).
# shows: 4-a
# not with: OVER_TLS
t_4-a_port_366() {
    has "$here/odmr.h" '^#define ODMR_PORT "366" '
    needs_namespaces -n "a network with a free port 366"
    mkdir "$T/queue"; accounts
    put_letter one 1.a a@example.edu eva@example.org
    export -f customer run run_traced fail
    export T ODMR PATIENCE
    in_a_network bash -u -c '
        timeout "$PATIENCE" "$ODMR" provider -q "$T/queue" -a "$T/accounts" 2> "$T/log" & provider=$!
        trap "kill $provider; wait" EXIT
        until [ "$(grep -c "listening on .*:366$" "$T/log")" = 2 ] || ! kill -0 "$provider"; do sleep 0.05; done
        customer 0 127.0.0.1; customer 1 127.0.0.1:366; customer 1 ::1; customer 1 "[::1]"' || fail "$(cat "$T/log")"
    equal "$(grep -cE "^$MOMENT odmr: listening on (0.0.0.0|\[::\]):366\$" "$T/log")" 2
}

# The provider sends messages only after ATRN, and only those that were queued when ATRN came (RFC 2645, 4).
# shows: 4-d
t_4-d_nothing_is_sent_without_being_asked() {
    provider
    login
    put_letter one 1.a a@example.edu eva@example.org
    silent || fail 'the provider spoke first'
    ask NOOP '^250 OK$'
    equal "$(waiting)" 1
    ask ATRN '^250 '
    put_letter two 2.a a@example.edu eva@example.org
    take_mail
    equal "$N_GOT" 1
    equal "$(waiting)" 1
}

# If the customer replies 4xx or closes the connection at any step, the message stays queued for the next session
# (RFC 2645, 4).
# shows: 4-e
t_4-e_mail_stays_until_it_is_taken() {
    local step reply
    provider
    put_letter one 1.a a@example.edu eva@example.org
    for step in GREETING EHLO MAIL RCPT DATA CONTENT; do
        for reply in '451 4.3.0 not now' '421 4.3.2 closing' nonsense CLOSE; do
            until_true settled
            ANSWERS=(["$step"]=$reply)
            turn
            equal "$N_GOT $(waiting)" '0 1' "$step: $reply"
        done
    done
    until_true settled
    ANSWERS=()
    turn
    equal "$N_GOT $(waiting)" '1 0'
}

# If each command waits for its reply, the replies decide which recipients are delivered, deferred or returned
# (RFC 2645, 4; RFC 5321, 4.2).
# shows: 4-e
t_4-e_outcomes_plain() {
    OFFER='' outcomes;
}

# If commands are sent in groups, the replies decide which recipients are delivered, deferred or returned
# (RFC 2645, 4; RFC 2920, 3.1).
# shows: 4-e
t_4-e_outcomes_pipelining() {
    OFFER=PIPELINING outcomes;
}

# If the content is sent with BDAT, the replies decide which recipients are delivered, deferred or returned
# (RFC 2645, 4; RFC 3030, 2).
# shows: 4-e
t_4-e_outcomes_chunking() {
    OFFER='PIPELINING CHUNKING' outcomes;
}

# The sender of a refused message gets one notice that names each refused recipient with its reply (RFC 2645, 4; RFC
# 3464, 2).
# shows: 4-e
t_4-e_the_notice() {
    provider
    {
        printf 'Subject: first\r\nX-Long: a\r\n\tb\r\n\r\nThe body.\r\n'
    } | put 1.a sender@example.edu eva@example.org bob@example.org zoe@example.org
    ANSWERS['RCPT TO:<eva@example.org>']='550 5.1.1 <eva>: '$'\e''[31mno such user'
    ANSWERS['RCPT TO:<bob@example.org>']='550 no'
    turn
    equal "$(notices)" 1
    equal "$(sed -n 1p "$T/notice.1")" "-i -f \\<\\> -- sender@example.edu "
    has "$T/notice.1" '^To: <sender@example.edu>$'
    has "$T/notice.1" '^From: .*<MAILER-DAEMON@example.net>$'
    has "$T/notice.1" '^Auto-Submitted: auto-replied$'
    has "$T/notice.1" '^Content-Type: multipart/report; report-type=delivery-status;$'
    equal "$(sed -n '/^Content-Type: message.delivery-status/,/^--/p' "$T/notice.1" |
        grep -v -e '-Date: ' -e '^--')" "Content-Type: message/delivery-status

Reporting-MTA: dns; example.net

Final-Recipient: rfc822; eva@example.org
Action: failed
Status: 5.1.1
Remote-MTA: dns; example.org
Diagnostic-Code: smtp; 550 5.1.1 <eva>: \\x1b[31mno such user

Final-Recipient: rfc822; bob@example.org
Action: failed
Status: 5.0.0
Remote-MTA: dns; example.org
Diagnostic-Code: smtp; 550 no"
    equal "$(sed -n '/^Content-Type: text.rfc822-headers/,/^--/p' "$T/notice.1" |
        grep -v '^--')" 'Content-Type: text/rfc822-headers

Subject: first
X-Long: a
	b'
    has "$T/notice.1" '^  <eva@example.org>$'
    hasnt "$T/notice.1" 'body\.'
    match "$(sed -n 's/^Arrival-Date: //p' "$T/notice.1")" '^[A-Z][a-z]{2}, '
    # a MIME parser finds three parts
    needs perl
    equal "$(sed 1d "$T/notice.1" | perl -ne '$b ||= $1 if /boundary="(.*)"/; $n++ if $b && /^--\Q$b\E$/;
        $e++ if $b && /^--\Q$b\E--$/; END { print "$n $e" }')" '3 1'
}

# Two providers on one queue and six customers at once deliver each of 600 messages exactly once (RFC 2645, 4).
t_exactly_once() {
    local i ports=() pids=()
    put_many 600 r%d@example.org
    provider; ports[0]=$PORT
    provider; ports[1]=$PORT
    for i in {1..6}; do
        ODMR_SECRET=tanstaaf "$ODMR" customer -u example.org -q "$T/mail$i" "127.0.0.1:${ports[i % 2]}" 2> "$T/err$i" &
        pids+=($!)
    done
    for i in "${pids[@]}"; do wait "$i"; done
    # a customer that came when all mail was claimed got 451; this one finds nothing left
    customer 1 "127.0.0.1:$PORT"
    equal "$(waiting)" 0
    equal "$(cat "$T"/mail*/example.org/new/* | sed -n 's/^Text of \(.*\)\./\1/p' | sort -n | tr '\n' ' ')" \
        "$(seq 600 | tr '\n' ' ')"
}

# Another provider can use the customer's Maildirs as its queue, with the same envelope and content (RFC 2645, 4).
t_a_customer_is_a_provider_in_turn() {
    provider
    put_letter one 1.a '' '"e va"@example.org' bob@example.org
    customer 0 "127.0.0.1:$PORT"
    rm -r "$T/queue"; mv "$T/mail" "$T/queue"
    provider
    turn
    equal "$(sed '/^$/q' "$T/got/1" | tr '\n' ' ')" \
        'MAIL FROM:<> RCPT TO:<"e va"@example.org> RCPT TO:<bob@example.org>  '
    match "$(sed '1,/^$/d' "$T/got/1" | head -n 1)" '^Received: from example.net '
    equal "$(sed '1,/^Received/d' "$T/got/1" | sed '1,2d' | tr -d '\r')" "$(letter one)"
    equal "$(waiting)" 0
}

# ---- RFC 2645, 5: States -----------------------------------------------------------------------------

# Each state begins when its command succeeds, a command that fails leads to no other state, and QUIT ends the session
# in each state (RFC 2645, 5).
# shows: 5-a 5-b
t_5-a_the_three_states() {
    provider --trace
    dialogue_on_a_new_connection <<'END'
P: 220 *
C: QUIT
P: 221 *
P: (closes)
END
    dialogue_on_a_new_connection <<'END'
P: 220 *
C: EHLO x
P: ...
P: 250 *
C: AUTH CRAM-MD5
P: 334 *
C: *
P: 501 *
C: ATRN
P: 530 *
C: QUIT
P: 221 *
P: (closes)
END
    until_true counted 2 disconnected "$LOG"
    equal "$(states "$LOG")" 'initial initial '
    login
    dialogue <<'END'
C: EHLO y
P: ...
P: 250 *
C: ATRN
P: 453 *
C: RSET
P: 250 *
C: ATRN
P: 453 *
C: QUIT
P: 221 *
P: (closes)
END
    until_true counted 3 disconnected "$LOG"
    equal "$(states "$LOG")" 'initial initial initial authenticated '
    put_letter one 1.a a@example.edu eva@example.org
    customer 0 --trace "127.0.0.1:$PORT"
    equal "$(states "$T/err")" 'initial authenticated reversed '
    equal "$(grep -o '\(P: QUIT\|C: 221.*\)$' "$T/err" | cut -c 1-6 | tr '\n' ' ')" 'P: QUI C: 221 '
    until_true counted 4 disconnected "$LOG"
    equal "$(states "$LOG")" 'initial initial initial authenticated initial authenticated reversed '
}
states() { sed -n 's/^\[[0-9]*\] -- \([a-z]*\) state (RFC 2645, 5\.[123]).*/\1/p' "$1" | tr '\n' ' '; }

# ---- RFC 2645, 5.1: Initial State --------------------------------------------------------------------

# If a customer is silent for longer than a time-out, or closes early, its mail stays queued, and the provider replies
# 421 where it still can (RFC 5321, 4.5.3.2.7).
t_silence_and_early_close() {
    provider --timeout 3 --login-timeout 5
    dialogue_on_a_new_connection <<'END'
P: 220 *
P: 421 *
P: (closes)
END
    dialogue_on_a_new_connection <<'END'
P: 220 *
C: (waits 1.7 s)
C: NOOP
P: 250 *
C: (waits 1.7 s)
C: NOOP
P: 250 *
C: (waits 1.7 s)
P: 421 *
P: (closes)
END
    login; expect '^421 '; closed
    put_letter one 1 a@example.edu eva@example.org
    login
    dialogue <<'END'
C: ATRN
P: 250 *
P: (closes)
END
    hang_up
    dial; hang_up
    dialogue_on_a_new_connection <<'END'
P: 220 *
C: EHL\c
C: (closes)
END
    login
    dialogue <<'END'
C: ATRN
P: 250 *
C: (closes)
END
    until_true claimable "$T/queue/example.org/new/1"
    turn
    equal "$N_GOT" 1
}

# A client that pipelines without pause also gets 421 when the log-in time-out is over (RFC 5321, 4.5.3.2).
t_no_time_without_end() {
    provider --login-timeout 1
    dial; expect '^220'
    ( while say NOOP; do :; done 2> /dev/null ) & STARTED+=($!)
    timeout "$PATIENCE" grep -q -m 1 '^421 .*not authenticated in time' <&"$LINE" || fail 'no 421'
}

# The 421 for a time-out or the shutdown is also sent in the middle of an AUTH exchange (RFC 5321, 3.8).
t_421_in_the_middle_of_auth() {
    provider --login-timeout 4
    open_session
    dialogue <<'END'
C: AUTH CRAM-MD5
P: 334 *
P: 421 *not authenticated in time*
P: (closes)
END
    provider
    open_session; ask "AUTH SCRAM-SHA-256" '^334 '
    kill -TERM "$PROVIDER"; expect '^421 .*shutting down'; closed
    wait "$PROVIDER"; equal $? 0
}

# After the 421 of a shutdown the provider sends no more replies, even if more commands have arrived (RFC 5321, 3.8).
t_no_reply_after_421() {
    provider
    dial; expect '^220'
    ( while say NOOP; do :; done 2> /dev/null ) & STARTED+=($!)
    for _ in {1..50}; do expect '^250 '; done
    kill -TERM "$PROVIDER"
    timeout "$PATIENCE" cat <&"$LINE" > "$T/replies" 2> /dev/null || true
    equal "$(sed -n '/^421/,$p' "$T/replies" | cut -c 1-3)" 421 'from the 421 on'
    wait "$PROVIDER"; equal $? 0
}

# ---- RFC 2645, 5.1.1: EHLO ---------------------------------------------------------------------------

# The response to EHLO names AUTH with CRAM-MD5, and ATRN (RFC 2645, 5.1 and 5.1.1).
# shows: 5.1-a 5.1.1-a 5.1.1-b 5.1.3-a 5-a
t_5.1.1-b_ehlo_lists_auth_and_atrn() {
    provider
    dialogue_on_a_new_connection <<'END'
P: 220 example.net on-demand mail relay server ready
C: EHLO example.org
P: 250-example.net
P: 250-AUTH CRAM-MD5*
P: 250 ATRN
C: QUIT
P: 221 example.net *
P: (closes)
END
}

# If the provider has no ATRN, has no usable mechanism, or replies 421, the customer's exit code says so (RFC 2645,
# 5.1.1).
t_customer_wants_atrn_and_a_mechanism() {
    serve peer_without_atrn
    customer 69 "127.0.0.1:$PORT"
    serve peer_without_mechanism
    customer 77 "127.0.0.1:$PORT"
    has "$T/err" 'no usable SASL mechanism: 127.0.0.1:[0-9]* offers FROB LOGIN X-FROB$'
    serve peer_busy
    customer 75 "127.0.0.1:$PORT"
    serve peer_closes
    customer 75 "127.0.0.1:$PORT"
    peer_ok
}
peer_without_atrn() {
    dialogue <<'END'
P: 220 x
C: EHLO *
P: 250-x
P: 250 AUTH CRAM-MD5
C: QUIT
END
}
peer_without_mechanism() {
    dialogue <<'END'
P: 220 x
C: EHLO *
P: 250-x
P: 250-AUTH FROB LOGIN
P: 250-AUTH=X-FROB
P: 250 ATRN
C: QUIT
END
}
peer_busy() { say '421 too busy'; hear || true; }
peer_closes() { say '220 x'; expect_line '^EHLO'; }

# The customer uses all AUTH lines of an EHLO response, in any order, also in the older form with = (RFC 4954, 3).
t_keywords_on_several_lines() {
    local order
    for order in '250-AUTH=LOGIN\r\n250-AUTH LOGIN CRAM-MD5' '250-AUTH LOGIN CRAM-MD5\r\n250-AUTH=LOGIN'; do
        ORDER=$order serve peer_with_two_auth_lines
        customer 1 "127.0.0.1:$PORT"
        peer_ok
    done
}
peer_with_two_auth_lines() {
    dialogue <<END
P: 220 x
C: EHLO *
P: 250-x
P: $ORDER
P: 250 ATRN
C: AUTH CRAM-MD5
P: 334 $(b64 '<1@x>')
C: ?*
P: 235 yes
C: ATRN
P: 453 none
C: QUIT
P: 221 bye
END
}

# The customer finds STARTTLS in a long EHLO response. If the response is too long, the customer sends nothing more in
# the clear (RFC 3207, 4).
t_a_very_long_ehlo_response() {
    unset OVER_TLS # this test speaks in the clear
    OFFERED=100 serve peer_that_offers_much
    customer 75 --trace "127.0.0.1:$PORT"
    has "$T/err" 'C: STARTTLS$'
    OFFERED=200 serve peer_that_offers_much
    customer 76 --trace "127.0.0.1:$PORT"
    hasnt "$T/err" 'C: \(STARTTLS\|AUTH\|ATRN\|QUIT\)'
}
peer_that_offers_much() {
    local n
    dialogue <<'END'
P: 220 x
C: EHLO *
P: 250-x
P: 250-AUTH CRAM-MD5
END
    for ((n = 0; n < OFFERED; n++)); do say "250-X-ODDITY-$n $(printf '%040d' "$n")"; done
    say '250-STARTTLS'; say '250 ATRN'; hear
}

# ---- RFC 2645, 5.1.2: AUTH ---------------------------------------------------------------------------

# CRAM-MD5 is accepted as RFC 2195 computes it, and a second AUTH has the reply 503 (RFC 2645, 5.1.2; RFC 4954, 4).
# shows: 5.1.2-a 5.1.2-b 5.1.2-c 5.2-a
t_5.1.2-c_cram_md5_by_hand() {
    provider
    open_session; ask 'AUTH CRAM-MD5' '^334 '
    ask "$(b64 "example.org $(hmac_md5 tanstaaf "$(unb64 "${ANSWER#334 }")")")" '^235 now authenticated as example.org$'
    dialogue <<'END'
C: AUTH CRAM-MD5
P: 503 *
C: QUIT
P: 221 *
P: (closes)
END
}

# Each mechanism authenticates a session that delivers mail, and TLS continues after the reversal (RFC 2645, 5.1.2).
# shows: 5.1.2-d 8-b
# not with: OVER_TLS
t_5.1.2-d_each_mechanism() {
    local mechanism
    accounts; printf 's3cret\n' | run 0 "$ODMR" account --scram verifier example.org
    cat "$T/out" >> "$T/accounts"
    tls_provider
    for mechanism in SCRAM-SHA-256-PLUS SCRAM-SHA-256 CRAM-MD5 PLAIN; do
        put_letter "$mechanism" 1.a a@example.edu eva@example.org
        customer 0 --trace --ca "$T/ca.crt" --require-tls --mechanism "$mechanism" "localhost:$PORT"
        has "$LOG" "authenticated as example.org ($mechanism, TLSv1.3 TLS_AES_256_GCM_SHA384)"
        has "$T/err" 'C: STARTTLS'
        [ "$mechanism" != PLAIN ] || { has "$T/err" 'AUTH PLAIN (response not shown)'; hasnt "$T/err" dGFuc3RhYWY; }
    done
    hasnt "$LOG" tanstaaf
    equal "$(mailbox)" 4
    put_letter five 1.a a@example.edu eva@example.org
    customer 0 --trace --ca "$T/ca.crt" "localhost:$PORT"
    has "$T/err" 'AUTH SCRAM-SHA-256-PLUS'
    equal "$(cat "$T/mail/example.org/new"/* | grep -c 'with ESMTPS')" 5
    customer 1 --trace "127.0.0.1:$PORT" --insecure
    has "$T/err" 'AUTH SCRAM-SHA-256-PLUS'
    for mechanism in SCRAM-SHA-256-PLUS SCRAM-SHA-256 PLAIN; do
        ODMR_SECRET=s3cret run 1 "$ODMR" customer -u verifier --ca "$T/ca.crt" --mechanism "$mechanism" \
            "localhost:$PORT"
    done
    ODMR_SECRET=s3cret run 77 "$ODMR" customer -u verifier --ca "$T/ca.crt" --mechanism CRAM-MD5 "localhost:$PORT"
    ODMR_SECRET=wrong run 77 "$ODMR" customer -u example.org --ca "$T/ca.crt" "localhost:$PORT"
    ODMR_SECRET=x run 64 "$ODMR" customer -u example.org --mechanism ROT13 "localhost:$PORT"
}

# With --no-cram-md5 the mechanism is neither offered nor accepted (RFC 2645, 5.1.2).
# shows: 5.1.2-e
# not with: OVER_TLS
t_5.1.2-e_a_site_without_cram_md5() {
    provider --no-cram-md5
    dialogue_on_a_new_connection <<'END'
P: 220 *
C: EHLO x
P: 250-example.net
P: 250-AUTH SCRAM-SHA-256
P: 250 ATRN
C: AUTH CRAM-MD5
P: 504 *
END
    customer 77 --mechanism CRAM-MD5 "127.0.0.1:$PORT"
    customer 1 "127.0.0.1:$PORT"
}

# With EXTERNAL a certificate logs in to the accounts that it names, and to no other (RFC 2645, 5.1.2; RFC 4422, A).
# shows: 5.1.2-f
# not with: OVER_TLS
t_5.1.2-f_external() {
    authority
    certificate other_ca '/CN=Another CA'
    certificate me /CN=somebody DNS:example.org ca
    certificate mail /CN=somebody email:other ca
    certificate cn /CN=example.org '' ca
    certificate both /CN=x DNS:nobody.example,DNS:other,DNS:example.org ca
    certificate stranger /CN=example.org DNS:stranger.example ca
    certificate forged /CN=example.org DNS:example.org other_ca
    tls_provider --client-ca "$T/ca.crt"
    external 1 me; has "$LOG" 'authenticated as example.org (EXTERNAL, TLSv1.3'
    external 1 me -u example.org
    external 77 me -u other
    external 1 cn
    external 1 mail; has "$LOG" 'authenticated as other (EXTERNAL, TLSv1.3'
    external 1 both -u example.org
    external 1 both -u other
    external 77 stranger
    external 77 forged; has "$T/err" 'no usable SASL mechanism: .* offers'
    has "$LOG" 'authentication failed'
    # a client with a certificate may also log in with a secret; a client without one is not offered EXTERNAL
    customer 1 --cert "$T/forged.pem" --ca "$T/ca.crt" "localhost:$PORT"
    customer 77 --ca "$T/ca.crt" --cert "$T/forged.pem" --mechanism EXTERNAL "localhost:$PORT"
    customer 1 --trace --ca "$T/ca.crt" --cert "$T/me.pem" --mechanism EXTERNAL "localhost:$PORT"
    has "$T/err" 'C: AUTH EXTERNAL'
    tunnel
    open_session
    hasnt <(echo "$ANSWER") EXTERNAL
    ask 'AUTH EXTERNAL =' '^504 '
    hang_up
    tunnel "$T/me.pem"
    dial; expect '^220'; ask 'EHLO x' 'EXTERNAL'
    ask "AUTH EXTERNAL" '^334 $'
    ask "$(b64 example.org)" '^235 '
}

# With a wrong secret, and not with the right one, the customer ends with exit code 77 (RFC 4954, 6).
t_customer_and_a_wrong_secret() {
    provider
    echo wrong > "$T/secret"
    run 77 "$ODMR" customer -u example.org -s "$T/secret" "127.0.0.1:$PORT"
    echo tanstaaf > "$T/secret"
    run 1 "$ODMR" customer -u example.org -s "$T/secret" "127.0.0.1:$PORT"
}

# ---- RFC 2645, 5.2: Authenticated State --------------------------------------------------------------

# A session ends with 421 when 100 commands in a row after the log-in are not ATRN (RFC 2645, 5.2; RFC 5321, 3.8).
t_idle_commands_after_the_log_in() {
    local n
    provider
    login
    for n in {1..99}; do ask NOOP '^250 '; done
    ask ATRN '^453 '
    for n in {1..50}; do ask RSET '^250 '; ask 'EHLO x' '^250'; done
    expect '^421 .*too many commands without ATRN'
    closed
}

# ---- RFC 2645, 5.2.1: ATRN ---------------------------------------------------------------------------

# ATRN before AUTH has the reply 530, whatever its argument is (RFC 2645, 5.2.1).
# shows: 5.2.1-b
t_5.2.1-b_atrn_before_authentication() {
    provider
    dialogue_on_a_new_connection <<'END'
P: 220 *
C: ATRN
P: 530 *
C: EHLO x
P: ...
P: 250 *
C: ATRN example.org
P: 530 *
C: ATRN nonsense,,
P: 530 *
C: ATRN ex\xe4mple.org
P: 530 *
END
    auth_cram_md5 example.org wrong '^535 '
    ask 'ATRN' '^530 '
}

# The customer waits ten minutes for the reply to ATRN, whatever --timeout says (RFC 2645, 5.2.1). Here the provider
# waits five seconds, and --timeout is three.
# shows: 5.2.1-c
t_5.2.1-c_patience_for_atrn() {
    serve peer_slow_atrn
    customer 1 --timeout 3 "127.0.0.1:$PORT"
    peer_ok
    has "$here/odmr.c" '^#define ATRN_TIMEOUT 600 '
}
peer_slow_atrn() {
    dialogue <<END
P: 220 x
C: EHLO *
P: 250-x
P: 250-AUTH CRAM-MD5
P: 250 ATRN
C: AUTH *
P: 334 $(b64 '<1@x>')
C: ?*
P: 235 yes
C: ATRN
P: (waits 5 s)
P: 453 You have no mail
END
}

# ATRN without a domain means all domains of the account, even more than one line could name (RFC 2645, 5.2.1).
t_5.2.1-d_more_domains_than_a_line_holds() {
    mkdir "$T/queue"
    {
        printf 'example.org:'; printf 'a-rather-long-label-number-%03d.example,' {1..300}; echo 'example.org:tanstaaf'
    } > "$T/accounts"
    chmod 600 "$T/accounts"
    provider
    put_letter one 1.a a@example.edu eva@a-rather-long-label-number-300.example
    turn
    equal "$N_GOT" 1
}

# If the account has no access to one domain of ATRN, the provider refuses the whole command with 450 (RFC 2645, 5.2.1).
# shows: 4-c 5.2.1-e 5.2.1-f 5.2.1-g 5.2.1-a 5.2.1-d 5.2.1-j 7-a
t_5.2.1-e_access_to_all_or_nothing() {
    provider
    put_letter one 1 a@example.edu eva@example.org
    put_letter two 2 a@example.edu eva@other.example
    login
    dialogue <<'END'
C: ATRN example.org,other.example
P: 450 ATRN request refused
C: ATRN other.example
P: 450 *
C: ATRN example.com
P: 453 You have no mail
END
    equal "$(waiting)" 2
    ask 'ATRN example.com,example.org,example.org' '^250 OK now reversing the connection$'
    take_mail
    equal "$N_GOT" 1
    equal "$(waiting)" 1
}

# If the provider has no mail, it may reply 250 to ATRN and send QUIT after EHLO; the customer reports no error
# (RFC 2645, 5.2.1).
# shows: 5.2.1-h
t_5.2.1-h_reversal_without_mail() {
    serve peer_without_mail
    customer 1 "127.0.0.1:$PORT"
    peer_ok
    hasnt "$T/err" lost
    equal "$(mailbox)" 0
}
peer_without_mail() { reverse; ask QUIT '^221 '; closed; }

# If the provider sends QUIT without the EHLO that RFC 2645, 5.2.1, requires, the customer still reports no mail.
t_5.2.1-h_quit_without_ehlo() {
    serve peer_quits
    customer 1 "127.0.0.1:$PORT"
    peer_ok
    hasnt "$T/err" closed
    unset OVER_TLS # this test speaks in the clear
    serve peer_quits
    perl_server
    relay 1 "$SERVER"
    peer_ok
    hasnt "$T/err" closed
    has "$T/heard" '^QUIT'
}
peer_quits() { provide; expect '^220 '; ask QUIT '^221 '; }

# With --interval an account that repeats ATRN too soon gets 450; other accounts are not affected (RFC 2645, 5.2.1).
# shows: 5.2.1-i
t_5.2.1-i_interval() {
    provider --interval 5
    login
    dialogue <<'END'
C: ATRN
P: 453 *
C: ATRN
P: 450 *
C: (closes)
END
    login
    dialogue <<'END'
C: ATRN
P: 450 *
C: (waits 5.1 s)
C: ATRN
P: 453 *
C: (closes)
END
    login other 'another secret: with colons'
    ask 'ATRN' '^453 '
}

# A refused ATRN starts no interval, because only mail or 453 does (RFC 2645, 5.2.1).
t_5.2.1-i_a_refusal_starts_no_interval() {
    provider --interval 3600
    login
    dialogue <<'END'
C: ATRN other.example
P: 450 *
C: ATRN nonsense
P: 501 *
C: ATRN
P: 453 *
C: ATRN
P: 450 ATRN request refused
END
}

# Neither 451 nor a connection that is lost after the 250 starts an interval (RFC 2645, 5.2.1).
# shows: 5.2.1-i
t_5.2.1-i_what_is_no_answer_starts_no_interval() {
    put_letter one 1.a a@example.edu eva@example.org
    provider --interval 3600
    login
    exec {CLAIM}< "$T/queue/example.org/new/1.a"
    flock "$CLAIM"; ask ATRN '^451 '; ask ATRN '^451 '
    exec {CLAIM}<&-
    ask ATRN '^250 '; hang_up
    until_true over 1
    login
    dialogue <<'END'
C: ATRN
P: 250 *
C: 220 me
P: EHLO *
C: 250 me
P: MAIL *
C: (closes)
END
    until_true over 2
    turn
    equal "$N_GOT" 1
    login; ask ATRN '^450 '
}

# If the provider cannot open a message, the reply to ATRN is 451, not 453 (RFC 2645, 5.2.1).
# shows: 5.2.1-k
t_5.2.1-k_mail_that_cannot_be_opened() {
    needs_capabilities 'file that the provider may not read' CHOWN SETUID
    chmod 755 "$T"
    put_letter one 1.a a@example.edu eva@example.org
    chown -R nobody "$T/queue"; chown root "$T/queue/example.org/new/1.a"; chmod 600 "$T/queue/example.org/new/1.a"
    provider --user nobody
    login
    ask ATRN '^451 Unable to process ATRN request now$'
    chown nobody "$T/queue/example.org/new/1.a"
    ask ATRN '^250 '
}

# If the provider cannot read a domain's queue, only an ATRN that includes the domain has the reply 451 (RFC 2645,
# 5.2.1).
# shows: 5.2.1-k 7-a
t_5.2.1-k_queue_that_cannot_be_read() {
    needs_capabilities 'file that the provider may not read' CHOWN SETUID
    chmod 755 "$T"
    mkdir -m 755 "$T/queue"
    mkdir -m 755 -p "$T/queue/example."{org,com}/{new,cur,tmp}
    chown -R nobody "$T/queue"
    provider --user nobody
    chown root "$T/queue/example.org"; chmod 700 "$T/queue/example.org"
    login
    ask 'ATRN' '^451 Unable to process ATRN request now$'
    ask 'ATRN example.com' '^453 '
}

# If a domain cannot be read, the mail of other domains is sent; if they have no mail, the reply is 451 (RFC 2645,
# 5.2.1).
t_5.2.1-k_one_domain_that_cannot_be_read() {
    provider
    mkdir -p "$T/queue/example.com"; : > "$T/queue/example.com/new"
    login; ask ATRN '^451 '; hang_up
    put_letter one 1.a a@example.edu eva@example.org
    turn
    equal "$N_GOT" 1
    equal "$(grep -c 'cannot read the queue of example.com: Not a directory; its mail waits$' "$LOG")" 2
}

# The log gives the reason for each 450 and 451 to ATRN (RFC 2645, 5.2.1).
t_5.2.1-k_the_log_says_why() {
    needs flock
    provider
    put_letter one 1.a a@example.edu eva@example.org
    exec {CLAIM}<> "$T/queue/example.org/new/1.a"; flock -n "$CLAIM"
    login; ask ATRN '^451 '
    has "$LOG" 'example.org/new/1.a skipped: locked by another session$'
    exec {CLAIM}>&-
    mv "$T/queue/example.org/new" "$T/queue/example.org/old"; touch "$T/queue/example.org/new"
    ask ATRN '^451 '
    has "$LOG" 'cannot read the queue of example.org: Not a directory; its mail waits$'
    has "$LOG" 'ATRN example.org,example.com answered 451: a domain cannot be read$'
    ask 'ATRN example.com,other.example,example.net' '^450 '
    has "$LOG" '\[1\] ATRN answered 450: account example.org has no access to other.example$'
    provider --interval 3600
    login; ask 'ATRN example.com' '^453 '; ask ATRN '^450 '
    has "$LOG" '\[1\] ATRN answered 450: account example.org repeated it within --interval 3600 s$'
}

# The argument of ATRN is a list of domains without blanks; anything else has the reply 501 (RFC 2645, 5.2.1).
# shows: 5.2.1-l
t_5.2.1-l_atrn_syntax() {
    local label
    label=$(printf 'a%.0s' {1..63})
    provider
    each_row ask_after_log_in <<END
ATRN org                     | 501 | 5.2.1: a domain has two labels or more
ATRN ..                      | 501 | RFC 5321, 4.1.2: no label is empty
ATRN .org                    | 501 | the same
ATRN example.org.            | 501 | the same
ATRN example..org            | 501 | the same
ATRN example.org, a.example  | 501 | 5.2.1: no blank in the list
ATRN a.b c.d                 | 501 | the same
ATRN example.org\\t           | 501 | the same
ATRN example.org\\x20         | 501 | the same
ATRN  example.org            | 501 | RFC 5321, 4.1.1: one blank after the verb
ATRN\\x20                     | 501 | a blank, and no domain
ATRN example.org,            | 501 | 5.2.1: a domain after each comma
ATRN ,example.org            | 501 | and one before it
ATRN -a.org                  | 501 | RFC 5321, 4.1.2: a letter or digit at the start of a label
ATRN a-.org                  | 501 | and at its end
ATRN a_b.org                 | 501 | RFC 5321, 4.1.2: letters, digits and hyphens
ATRN ../example.org          | 501 | no path
ATRN example.org/../x        | 501 | no path
ATRN ex\\xe4mple.org          | 501 | no octet over 127
ATRN ${label}a.org | 501 | RFC 1035, 2.3.4: a label has 63 octets at most
ATRN $label.org   | 450 | 5.2.1: the syntax is right, but there is no access
ATRN a-b.1.org               | 450 | the same
ATRN EXAMPLE.ORG             | 453 | RFC 5321, 2.4: a domain in upper case is the same
atrn Example.Com,example.org | 453 | and so is a command in lower case
END
}
ask_after_log_in() { login; ask_raw "$@"; hang_up; }

# If another session has claimed the mail, the reply to ATRN is 451, not 453; the claim ends with the process that holds
# it (RFC 2645, 5.2.1).
t_claimed_by_another_session() {
    needs flock
    provider
    put_letter one 1 a@example.edu eva@example.org
    exec {CLAIM}<> "$T/queue/example.org/new/1"
    flock -n "$CLAIM"
    login
    ask 'ATRN' '^451 '
    exec {CLAIM}>&-
    ask 'ATRN' '^250 '
    take_mail
    equal "$N_GOT" 1
}

# A domain that an account or an ATRN names twice is served once (RFC 2645, 5.2.1).
t_a_domain_named_twice() {
    echo 'example.org:Example.org,example.com,example.org:tanstaaf' > "$T/accounts"; chmod 600 "$T/accounts"
    provider
    put_letter one 1.a a@example.edu eva@example.org
    turn
    equal "$N_GOT" 1
    put_letter one 1.a a@example.edu eva@example.org
    turn example.com,EXAMPLE.org,example.org
    equal "$N_GOT" 1
    hasnt "$LOG" 'skipped: locked'
}

# ---- RFC 2645, 5.3: Reversed State -------------------------------------------------------------------

# After ATRN the customer is an SMTP server, and the messages that it accepts are in its Maildir (RFC 2645, 5.3).
# shows: 5.3-a 5.3-b
t_5.3-b_the_customer_as_server() {
    local date='[A-Z][a-z]{2}, [0-9 ][0-9] [A-Z][a-z]{2} 20[0-9]{2} [0-9:]{8} [+-][0-9]{4}'
    serve peer_commands
    customer 0 --trace "127.0.0.1:$PORT" example.org example.com
    peer_ok
    equal "$(grep -c '^\[1\] P: \.$' "$T/err")" 2 'ends of DATA in the trace'
    has "$T/err" 'mail for x@elsewhere.example, whose domain ATRN did not request or cannot name; answered 450$'
    equal "$(mailbox)" 3
    equal "$(mailbox example.com)" 1
    equal "$(ls "$T/mail/example.org/tmp")" ''
    equal "$(head -n 2 "$T"/mail/example.com/new/* | tr '\n' ' ')" 'Return-Path: <> Delivered-To: x@Example.com '
    match "$(sed -n 3,5p "$T"/mail/example.com/new/* | tr '\n' ' ')" \
        '^Received: from example.net \(127.0.0.1:[0-9]+\) 	by example.org with ESMTPS? \(odmr, RFC 2645\); 	'"$date"' $'
    equal "$(stored example.com)" "$(printf 'Subject: x\n\n.dot\n..\n')"
}
peer_commands() {
    provide
    expect '^220 example.org ready to receive email$'
    each_row ask_raw <<'END'
MAIL FROM:<a@b.example>  | 503       | RFC 5321, 4.1.4: EHLO comes first
EHLO                     | 501       | RFC 5321, 4.1.1.1: it has an argument
EHLO evil\rInjected: yes | 501       | RFC 5321, 2.3.8: no CR but before LF
EHLO \x1b[31mred         | 501       | RFC 5321, 4.1.2: no control characters
EHLO two words           | 501       | RFC 5321, 4.1.1.1: one argument
END
    dialogue <<'END'
P: HELO example.net
C: 250 example.org
P: EHLO example.net
C: 250-example.org
C: 250-PIPELINING
C: 250-8BITMIME
C: 250-SMTPUTF8
C: 250-CHUNKING
C: 250-LIMITS RCPTMAX=1000
C: 250-ENHANCEDSTATUSCODES
C: 250 SIZE
END
    each_row ask_raw <<'END'
NOOP                     | 250       | RFC 5321, 4.1.1.9
VRFY eva                 | 252       | RFC 5321, 3.5.3: it need not be verified
RSET                     | 250       | RFC 5321, 4.1.1.5
FROB                     | 50[02]    | RFC 5321, 4.2.4: unknown
ATRN                     | 502       | RFC 2645, 5.3: the roles are reversed
RCPT TO:<x@example.org>  | 503       | RFC 5321, 4.1.4: MAIL comes first
DATA                     | 503       | the same
MAIL FROM:a@b.example    | 501       | RFC 5321, 4.1.2: a path has angle brackets
MAIL FROM:<a@b.example   | 501       | both of them
MAIL FROM:<a b@c.example> | 501      | and no blank
MAIL FROM:<a@b.example> FROB=1 | 555 | RFC 5321, 4.1.1.11: a parameter that was not offered
MAIL FROM: <a@b.example> SIZE=100 BODY=8BITMIME SMTPUTF8 | 250 | RFC 1870, 6152, 6531
MAIL FROM:<a@b.example>  | 503       | RFC 5321, 4.1.4: a transaction is open
RCPT TO: <x@example.org> | 250       | the blank is RFC 2645's, section 6
RCPT TO:<@relay.example,@b.example:"q >q"@example.org> | 250 | RFC 5321, 4.1.1.3: a route is ignored
RCPT TO:<x@elsewhere.example> | 450 4\.7\.1 | a domain that was not asked for: deferred
RCPT TO:<x@elsewhere.example> NOTIFY=NEVER | 450 4\.7\.1 | also with an unknown parameter
RCPT TO:<x@localhost>    | 450 4\.7\.1 | a domain that no ATRN can name
RCPT TO:<x@elsewhere-.example> | 450 4\.7\.1 | the same
RCPT TO:<x>              | 501       | RFC 5321, 4.1.1.3: only postmaster has no domain
RCPT TO:<>               | 501       | RFC 5321, 4.1.2: no recipient is empty
RCPT TO:<x@../example.org> | 501     | no path
RCPT TO:<x@example.org> NOTIFY=NEVER | 555 | RFC 5321, 4.1.1.11
END
    dialogue <<'END'
P: DATA
C: 354 *
P: Subject: one
P:
P: text
P: .
C: 250 *
P: RCPT TO:<x@example.org>
C: 503 *
P: MAIL FROM:<>
C: 250 *
P: RCPT TO:<x@Example.com>
C: 250 *
P: DATA
C: 354 *
P: Subject: x
P:
P: ..dot
P: ...\c
P: \r\n.
C: 250 *
P: DATA
C: 503 *
P: MAIL FROM:<a@b.example>
C: 250 *
P: RSET
C: 250 *
P: DATA
C: 503 *
P: MAIL FROM:<a@b.example>
C: 250 *
P: RCPT TO:<x@example.org>
C: 250 *
P: BDAT 4\r\nS: x\c
C: 250 *
P: MAIL FROM:<a@b.example>
C: 503 *
P: BDAT 9 LAST\r\n\r\n\r\nthe e\c
C: 250 *
P: BDAT 5\r\nabcde\c
C: 503 *
P: MAIL FROM:<a@b.example>
C: 250 *
P: RCPT TO:<x@example.org>
C: 250 *
P: BDAT 0 LAST
C: 250 *
P: QUIT
C: 221 *
END
}

# If the customer's server does not know EHLO, the provider sends HELO and uses no extension (RFC 2645, 5.3; RFC 5321,
# 3.2).
t_5.3-c_helo_where_ehlo_is_unknown() {
    provider
    put_letter one 1.a a@example.edu eva@example.org
    ANSWERS[EHLO]='502 what?'
    turn
    equal "$N_GOT" 1
    equal "$(sed 's/:.*//' "$T/heard" | tr '\n' ' ')" 'EHLO example.net HELO example.net MAIL FROM RCPT TO DATA QUIT '
}

# The provider finds a keyword after any number of others. If the EHLO response is too long, no message is sent or
# returned (RFC 2645, 5.3).
t_5.3-c_endless_offer() {
    provider
    printf 'Subject: a\n\n\374\n' | put 1.a a@example.edu eva@example.org
    OFFER="$(printf 'X%d ' {1..200}) 8BITMIME" turn
    until_true settled
    equal "$N_GOT $(waiting) $(notices)" '0 1 0'
    OFFER="$(printf 'X%0900d ' 1 2 3) 8BITMIME" turn
    until_true settled
    equal "$N_GOT $(waiting) $(notices)" '1 0 0'
}

# If 100 commands in a row do not advance a message, the session ends with 421; a command that does restarts the count
# (RFC 5321, 3.8).
t_idle_commands() {
    serve peer_that_idles
    customer 76 "127.0.0.1:$PORT"
    peer_ok
    equal "$(mailbox)" 1
}
peer_that_idles() {
    local n
    reverse
    for n in {1..30}; do ask NOOP '^250 '; ask RSET '^250 '; ask 'VRFY x' '^252 '; done
    store eva@example.org
    for n in {1..33}; do ask NOOP '^250 '; ask 'EHLO x' '^250'; ask 'MAIL FROM:<>' '^250'; done
    ask NOOP '^421 '
    closed
}

# The customer ends a session with 421 after 100 commands that it does not know (RFC 2645, 5.3; RFC 5321, 3.8).
t_customer_leaves_a_talkative_peer() {
    serve peer_talkative
    customer 76 "127.0.0.1:$PORT"
    peer_ok
}
peer_talkative() {
    local i
    reverse
    for ((i = 1; i < 100; i++)); do
        if [ $((i % 2)) = 0 ]; then ask TURN '^502 '; else printf 'NOOP \0\r\n'; expect '^500 '; fi
    done
    ask TURN '^421 '
    closed
}

# A 5xx reply that concerns the session returns no mail, and the log gives its reason once (RFC 2645, 5.3; RFC 5321,
# 4.2.3).
t_replies_about_the_session() {
    local code command
    provider
    put_many 4
    for OFFER in '' PIPELINING 'PIPELINING CHUNKING'; do
        for command in MAIL DATA BDAT; do
            [[ $command$OFFER != BDAT && $command$OFFER != BDATPIPELINING && $command$OFFER != DATA*CHUNKING ]] ||
                continue
            for code in 500 502 503 504 521 530 534 535 538; do
                [[ $command$code != BDAT50[024] ]] || continue
                : > "$LOG"
                ANSWERS=([$command]="$code 5.7.0 Must issue a STARTTLS command first")
                if [ "$command" = BDAT ]; then ANSWERS=([CONTENT]="$code 5.7.0 Must issue a STARTTLS command first"); fi
                turn
                until_true settled
                equal "$(waiting) $(notices) $(tail -n 1 "$T/heard")" '4 0 QUIT' "$OFFER: $code to $command"
                counted 1 "the customer's server is not ready for mail: $code 5\.7\.0 Must" "$LOG" ||
                    fail "$OFFER: $code to $command"
            done
        done
    done
    # after the final dot, any 5xx code refuses the message
    OFFER=PIPELINING ANSWERS=([CONTENT]='500 5.5.2 Line too long')
    turn
    until_true settled
    equal "$(waiting) $(notices)" '0 4'
}

# If the customer refuses the session, the mail stays, and the log has the reply (RFC 2645, 5.3; RFC 5321, 3.1).
t_the_log_says_who_refused_the_session() {
    local command reply
    provider
    put_letter one 1.a a@example.edu eva@example.org
    while read -r command reply; do
        : > "$LOG"
        ANSWERS=(["$command"]=$reply)
        turn
        until_true settled
        equal "$N_GOT $(waiting)" '0 1' "$command: $reply"
        counted 1 "the customer's server is not ready for mail: $reply; the rest of the mail stays queued" "$LOG" ||
            fail "$command: $reply is not in the log once: $(< "$LOG")"
    done <<'END'
GREETING 554 no service
GREETING 421 later
GREETING 250 hello
EHLO 450 not now
EHLO 354 go on
END
    ANSWERS=([EHLO]='502 no' [HELO]='550 5.7.1 not you'); turn
    until_true settled
    equal "$(waiting)" 1
    has "$LOG" "the customer's server is not ready for mail: 550 5.7.1 not you; "
}

# If a server refuses every message, the provider returns ten messages and no more (RFC 2645, 5.3).
t_a_server_that_refuses_everything() {
    provider
    for OFFER in '' PIPELINING 'PIPELINING CHUNKING'; do
        rm -rf "$T/queue/example.org" "$T"/notice.*; : > "$LOG"
        put_many 25
        ANSWERS=([RCPT]='554 5.7.1 relay access denied')
        turn
        until_true settled
        equal "$(waiting) $(notices) $(tail -n 1 "$T/heard")" '15 10 QUIT' "$OFFER"
        has "$LOG" "the customer's server refused 10 messages and accepted none; the rest of the mail stays queued"
    done
    # if one message was accepted, each refused message is returned
    rm -rf "$T/queue/example.org" "$T"/notice.*
    put_many 15 r%d@example.org
    ANSWERS=([RCPT]='554 5.7.1 relay access denied' ['RCPT TO:<r1@example.org>']='250 ok')
    turn
    until_true settled
    equal "$(waiting) $(notices)" '0 14'
}

# Messages that were accepted before a connection broke have left the queue, so the next session sends only the rest
# (RFC 2645, 5.3).
t_a_broken_line_makes_progress() {
    local way
    provider
    for way in 'PIPELINING CHUNKING' PIPELINING; do
        put_many 60 eva@example.org 200000
        login; ask ATRN '^250 '
        receiver 'my $n = 0; greets(qw('"$way"'));
            while ($n < 25) { my $l = heard();
                if ($l =~ /^BDAT (\d+)/) { content($1); $n++ } if ($l eq "DATA") { said(354); 1 while heard() ne ".";
                    $n++ } said("250 ok") }
            setsockopt STDIN, SOL_SOCKET, SO_LINGER, pack("ii", 1, 0) or die'
        hang_up
        until_true settled
        [ "$(waiting)" -le 37 ] || fail "$way: $(waiting) of 60 wait, though 25 were taken"
        rm -f "$T/queue/example.org/new"/*
    done
}

# An accepted message leaves the queue during the session, so a provider that is killed sends few messages twice
# (RFC 2645, 5.3).
t_replies_are_settled_as_they_arrive() {
    local PATIENCE=$((PATIENCE * 3)) # 14 MB pass through the receiver
    provider
    put_many 70 eva@example.org 200000
    login; ask ATRN '^250 '
    receiver 'my $n = 0; greets(qw(PIPELINING CHUNKING));
        while (1) { my $l = heard(); if ($l =~ /^BDAT (\d+)/) { content($1); $n++ } said("250 ok");
            if ($n == 40) { print STDERR "forty\n"; sleep 60 } }' 2> "$T/forty" &
    STARTED+=($!)
    until_true shows "$T/forty" forty
    until_true eval '[ "$(waiting)" -le 35 ]'
    kill -9 "$PROVIDER"
    [ "$(waiting)" -ge 30 ] || fail "$(waiting) wait, though only 40 of 70 were accepted"
}

# ---- RFC 2645, 5.4: Other Commands -------------------------------------------------------------------

# Every command has its reply in each state; the reply is 502 if ODMR does not have the command there (RFC 2645, 5.1,
# 5.2 and 5.4).
# shows: 4-c 5.1-a 5.2-a 5.4-a 7-a
t_5.4-a_each_command_in_each_state() {
    provider
    dial
    expect '^220'
    ask_raw 'AUTH CRAM-MD5' 503 'RFC 2645, 5.1.1: EHLO comes first'
    common_commands
    dialogue <<'END'
C: EHLO example.org
P: ...
P: 250 *
C: ATRN
P: 530 *
C: (closes)
END
    login
    common_commands
    dialogue <<'END'
C: EHLO example.org
P: ...
P: 250 *
C: AUTH CRAM-MD5
P: 503 *
C: ATRN
P: 453 *
C: QUIT
P: 221 *
P: (closes)
END
}
common_commands() {
    each_row ask_raw <<'END'
NOOP                    | 250 | RFC 2645, 5.4: a command of every state
noop with text          | 250 | RFC 5321, 4.1.1.9: its argument is ignored
RSET                    | 250 | RFC 5321, 4.1.1.5
HELP                    | 214 | RFC 5321, 4.1.1.8
HELO example.org        | 502 | RFC 2645, 5.1.1: EHLO it is
MAIL FROM:<a@b.example> | 502 | RFC 2645, 5.4: no command of these states
RCPT TO:<a@example.org> | 502 | the same
DATA                    | 502 | the same
TURN                    | 502 | the same
ETRN example.org        | 502 | the same
VRFY eva                | 502 | the same
FROBNICATE              | 502 | RFC 5321, 4.2.4: no command at all
END
}

# ---- RFC 2645, 6: Example On-Demand Mail Relay Session -----------------------------------------------

# Both traces show the example of RFC 2645, 6, line by line. The RFC leaves open the challenge, the other keywords of
# EHLO, the text of a reply, the blanks in FROM: and TO:, and the parameters.
# shows: 4-b 5.3-a 5.3-b 5.3-c 5-b 6-a
t_6-a_the_example_session() {
    local side who
    provider -n EXAMPLE.NET --trace
    put_letter one 1 Lester.Tester@dot.foo.bar l.eva.msg@example.com
    customer 0 --trace --mechanism CRAM-MD5 "127.0.0.1:$PORT" example.org example.com
    cat > "$T/expected" <<'END'
P: 220 EXAMPLE.NET on-demand mail relay server ready
C: EHLO example.org
P: 250-EXAMPLE.NET
P: 250-AUTH CRAM-MD5
P: 250 ATRN
C: AUTH CRAM-MD5
P: 334 (base64)
C: (base64)
P: 235 now authenticated as example.org
C: ATRN example.org,example.com
P: 250 OK now reversing the connection
C: 220 example.org ready to receive email
P: EHLO EXAMPLE.NET
C: 250-example.org
C: 250 SIZE
P: MAIL FROM:<Lester.Tester@dot.foo.bar>
C: 250 OK
P: RCPT TO:<l.eva.msg@example.com>
C: 250 OK, recipient accepted
P: QUIT
C: 221 example.org closing connection
END
    for side in err provider0.log; do
        sed -nE -e 's/^\[[0-9]+\] ([PC]: .*)/\1/p' "$T/$side" | sed -E \
            -e 's/^(P: 250-AUTH) .*/\1 CRAM-MD5/' -e '/^P: 250-STARTTLS/d' \
            -e 's/^(P: 334|C:) [A-Za-z0-9+\/]{20,}=*$/\1 (base64)/' \
            -e '/^C: 250[- ](PIPELINING|8BITMIME|SMTPUTF8|CHUNKING|LIMITS RCPTMAX=1000|ENHANCEDSTATUSCODES)/d' \
            -e 's/^(C: 2[0-9][0-9]) [0-9.]+ /\1 /' -e 's/(FROM:<[^>]*>).*/\1/' \
            -e '/^P: BDAT/d' -e '/^P: \.\.\./d' -e '/message stored/d' > "$T/seen"
        for who in P C; do # with PIPELINING only the lines of one side are in order
            same <(grep "^$who" "$T/expected") <(grep "^$who" "$T/seen") "$who: in $side"
        done
    done
    equal "$(stored example.com)" "$(letter one)"
}

# ---- RFC 2645, 7: Response Codes ---------------------------------------------------------------------

# The customer's exit code says which reply ATRN had (RFC 2645, 7).
t_customer_exit_codes() {
    local code reply
    serve peer_atrn
    while read -r code reply; do
        printf '%s' "$reply" > "$T/reply"
        customer "$code" "127.0.0.1:$PORT"
        [ "$code" = 1 ] || has "$T/err" '^odmr: '
    done <<'END'
1 453 You have no mail
75 450 refused
75 451 not now
77 530 log in first
69 502 what?
69 554 no
76 354 go ahead
76 nonsense
76 2500 digits
76 999 no such code
END
    peer_ok
    customer 68 nonexistent.invalid
    customer 69 127.0.0.1:1
    equal "$(mailbox)" 0
}
peer_atrn() { provide "$(cat "$T/reply")"; hear || true; }

# The customer reports a reply of several lines on one line (RFC 5321, 4.2.1).
t_replies_of_several_lines_in_the_log() {
    serve peer_with_a_long_refusal
    customer 75 "127.0.0.1:$PORT"
    has "$T/err" 'the reply to ATRN was 450 not now / nor later$'
}
peer_with_a_long_refusal() { provide $'450-not now\r\n450 nor later'; goodbye; }

# ---- RFC 2645, 8: Security Considerations ------------------------------------------------------------

# With --allow only the listed networks are served, and AUTH is still required (RFC 2645, 8).
# shows: 8-a
# not with: OVER_TLS
t_8-a_access_by_address() {
    provider --allow 10.0.0.0/8 --allow ::1
    dial; expect '^554 '; closed
    provider --allow 10.0.0.0/8 --allow 127.0.0.0/30
    dial; expect '^220 '
    ask ATRN '^530 '                       # --allow does not replace AUTH
    provider -l '[::1]:0' --allow ::1/128
    PORT=$(sed -n 's/.*listening on \[::1\]:\([0-9]*\)$/\1/p' "$LOG")
    exec {LINE}<> "/dev/tcp/::1/$PORT"; expect '^220 '
}

# --allow takes prefixes of any length and both families. An IPv4 address equals its IPv4-mapped IPv6 address, but an
# IPv6 prefix shorter than 96 matches IPv6 only (RFC 2645, 8; RFC 4291, 2.5.5.2).
# shows: 8-a
# not with: OVER_TLS
t_8-a_prefixes() {
    local network
    for network in 127.0.0.1 127.0.0.1/32 127.0.0.0/31 126.0.0.0/7 0.0.0.0/0 ::ffff:127.0.0.0/104 ::ffff:0:0/96; do
        provider --allow 192.0.2.1 --allow "$network"
        dial; expect '^220 '; hang_up; stop_provider
    done
    for network in 127.0.0.2 127.0.0.2/31 128.0.0.0/1 ::1 ::ffff:128.0.0.0/97 ::/0 ::/1 ::1/33 ::/95; do
        provider --allow "$network"
        dial; expect '^554 '; closed; hang_up; stop_provider
    done
    for network in ::1/128 ::/127 ::/0 8000::/1 0.0.0.0/0; do
        provider -l '[::1]:0' --allow "$network"
        PORT=$(sed -n 's/.*listening on \[::1\]:\([0-9]*\)$/\1/p' "$LOG")
        exec {LINE}<> "/dev/tcp/::1/$PORT"
        if [ "$network" = 8000::/1 ] || [ "$network" = 0.0.0.0/0 ]; then expect '^554 '; else expect '^220 '; fi
        hang_up; stop_provider
    done
}

# ---- RFC 5321: SMTP ----------------------------------------------------------------------------------

# Queues ten messages whose contents and envelopes are easily damaged, and copies the queue to $T/copy.
make_messages() {
    printf 'Subject: dots\n\n.\n..\n.a\nb.\n.\n' | put 1 a@example.edu eva@example.org
    printf 'Subject: no body\n' | put 2 '' eva@example.org
    printf 'Subject: no last newline\n\nthe end' | put 3 a@example.edu eva@example.org bob@example.org
    { printf 'Subject: long\n\n'; printf '%05000d\n' 7; } | put 4 '"a b"@example.edu' eva@example.org
    printf 'Subject: 8-bit\n\n\xff\xfe\x80 \xc3\xa9\n' | put 5 a@example.edu eva@example.org
    printf 'Subject: CRLF\r\n\r\nline\r\n.dot\r\n' | put 6 a@example.edu '"e va"@example.org'
    printf 'Subject: stray CR\n\none\rtwo\r\rthree\n\r\nfour\r' | put 7 a@example.edu eva@example.org
    : | put 8 a@example.edu eva@example.org
    printf 'Return-Path-Not: x\nDelivered-To: earlier@hop.example\n\nbody\n' | put 9 a@example.edu eva@example.org
    # 17 octets, repeated: wherever the sender divides the content, each octet is at a boundary once
    perl -e 'print "Subject: edges\n\n", ".\r\na\r\n\n.b\n..\r\r\n\r." x 8000' | put 10 a@example.edu eva@example.org
    cp -r "$T/queue" "$T/copy"
}
# Checks each octet of the content, the envelopes and the order, at a receiver that is not our customer.
check_content() {
    local n
    provider
    make_messages
    turn
    equal "$N_GOT" 10
    for n in {1..10}; do
        sed '1,/^$/d' "$T/got/$n" > "$T/body"
        perl -0777 -pe 's/\A((Return-Path|Delivered-To): .*\n)*//' "$T/copy/example.org/new/$n" | wire > "$T/wanted"
        same "$T/wanted" "$T/body" "message $n"
    done
    equal "$(sed -n 1p "$T/got/2" | cut -d' ' -f1-2)" 'MAIL FROM:<>'
    equal "$(sed -n 2,3p "$T/got/3" | tr '\n' ' ')" 'RCPT TO:<eva@example.org> RCPT TO:<bob@example.org> '
    match "$(sed -n 1p "$T/got/4")" '^MAIL FROM:<"a b"@example.edu>'
    equal "$(sed -n 2p "$T/got/6")" 'RCPT TO:<"e va"@example.org>'
    equal "$(waiting)" 0
}

# The provider refuses a command that is over 512 octets or has an octet outside SMTP, and accepts LF alone as line end
# (RFC 5321, 2.3.8 and 4.5.3.1.4).
t_bad_lines() {
    local long
    provider
    login
    printf 'NOOP with LF alone\n' >&"$LINE"; expect '^250 '
    long=$(printf '%0600d' 0)
    printf 'NOOP %s\n' "${long:0:506}" >&"$LINE"; expect '^250 ' # 512 with LF
    printf 'NOOP %s\n' "${long:0:507}" >&"$LINE"; expect '^500 '
    each_row ask_raw <<END
NOOP $long | 500 | RFC 5321, 4.5.3.1.4: 512 octets at most
NOOP ${long:0:505} | 250 | exactly 512 with CRLF
NOOP ${long:0:506} | 500 | 513
NOOP \\0            | 500 | RFC 5321, 2.3.8 and 4.1.2: no control characters
NOOP \\x80          | 500 | no octet over 127
NOOP \\t            | 500 | no tab
                   | 50[0-2] | no command
\\x20NOOP           | 50[0-2] | a blank before the verb
END
    printf 'NO' >&"$LINE"; moment 0.2; ask 'OP' '^250 '
    ask 'ATRN' '^453 '
}

# A command with too few or too many arguments has the reply 501 (RFC 5321, 4.2.4).
t_bad_arguments() {
    provider
    dial; expect '^220'
    each_row ask_raw <<'END'
EHLO            | 501    | RFC 5321, 4.1.1.1: it has an argument
EHLO two words  | 501    | and no second one
AUTH CRAM-MD5   | 503    | RFC 4954, 4: after EHLO
EHLO example.org\x20\x20 | 250 | RFC 5321, 4.1.1: blanks before CRLF are tolerated
AUTH            | 501    | RFC 4954, 4: it names a mechanism
AUTH  CRAM-MD5  | 50[14] | and after one blank
RSET x          | 501    | RFC 5321, 4.1.1.5: no argument
QUIT x          | 501    | RFC 5321, 4.1.1.10: no argument
STARTTLS        | 50[23] | RFC 3207, 4: not offered, or TLS is there
END
    hang_up
    login
    each_row ask_raw <<'END'
EHLO            | 501    | in the authenticated state as before
QUIT x          | 501    | the same
RSET x          | 501    | the same
HELP x          | 214    | RFC 5321, 4.1.1.8: it may have an argument
quit\x20        | 221    | RFC 5321, 4.1.1: blanks before CRLF are tolerated
END
    closed
}

# A line over 512 octets, 12,288 for AUTH, or 8,192 for ATRN, has the reply 500 and is read to its end (RFC 5321,
# 4.5.3.1.4; RFC 4954, 4).
t_long_lines() {
    local long
    provider
    open_session
    long=$(printf '%012000d' 0)
    each_row ask_raw <<END
AUTH CRAM-MD5 $long | 501 | CRAM-MD5 has no initial response
AUTH CRAM-MD5 ${long}${long:0:274} | 500 | RFC 4954, 4: 12,288 octets at most
ATRN $long | 500 | before the log-in, 512 octets
END
    head -c 3000000 /dev/zero | tr '\0' x >&"$LINE"
    ask '' '^500 '
    ask 'NOOP' '^250 '
    long=$(printf '%012286d' 0)
    ask 'AUTH CRAM-MD5' '^334 '; ask "$long" '^501 '    # 12288 with CRLF
    ask 'AUTH CRAM-MD5' '^334 '; ask "${long}0" '^500 '
    hang_up
    login
    long=$(printf 'a.example,%.0s' {1..818})    # 8180 octets
    ask "ATRN ${long}b.org" '^450 '             # 8192 with CRLF
    ask "ATRN ${long}bc.org" '^500 '
    ask 'ATRN' '^453 '
}

# If each command waits for its reply, content, envelopes and order are preserved (RFC 5321, 4.5.2).
t_content_plain() {
    OFFER='8BITMIME SIZE'
    check_content
}

# With PIPELINING, content, envelopes and order are preserved (RFC 5321, 4.5.2; RFC 2920, 3.1).
t_content_pipelining() {
    OFFER='8BITMIME SIZE PIPELINING'
    check_content
}

# With CHUNKING, content, envelopes and order are preserved (RFC 5321, 2.3.8; RFC 3030, 2).
t_content_chunking() {
    OFFER='8BITMIME SIZE PIPELINING CHUNKING'
    check_content
}

# The customer stores the same content with LF as line end (RFC 5321, 2.3.8).
t_content_into_our_maildir() {
    local n
    provider
    make_messages
    customer 0 "127.0.0.1:$PORT"
    equal "$(mailbox)" 10
    n=0
    for file in $(ls "$T/mail/example.org/new" | sort -V); do
        n=$((n + 1))
        sed '1,/^Received: /d' "$T/mail/example.org/new/$file" | sed '1,2d' > "$T/body"
        perl -0777 -pe 's/\A((Return-Path|Delivered-To): .*\n)*//' "$T/copy/example.org/new/$n" | wire |
            tr -d '\r' > "$T/wanted"
        same "$T/wanted" "$T/body" "message $n"
    done
}

# Only CRLF.CRLF ends a message, and a message with a bare CR or LF is refused with 550 and not stored (RFC 5321, 2.3.8
# and 4.1.1.4).
t_no_smuggling() {
    serve peer_smuggler
    customer 1 "127.0.0.1:$PORT"
    peer_ok
    equal "$(mailbox)" 0
    equal "$(ls "$T/mail/example.org/tmp")" ''
}
peer_smuggler() {
    local end
    reverse
    for end in '\n.\n' '\n.\r\n' '\r\n.\n' '\r.\r' '\r\n.\r' '\r.\r\n' '\n\n.\r\r\n' 'x\ry' 'x\ny' '\r\n.\rx\r\n'; do
        dialogue <<END
P: MAIL FROM:<a@b.example>
C: 250 *
P: RCPT TO:<x@example.org>
C: 250 *
P: DATA
C: 354 *
P: Subject: x\\r\\n\\r\\ntext${end}MAIL FROM:<evil@b.example>
P: .
C: 550 *
P: NOOP
C: 250 *
END
    done
    dialogue <<'END'
P: MAIL FROM:<a@b.example>
C: 250 *
P: RCPT TO:<x@example.org>
C: 250 *
P: BDAT 6 LAST\r\na\nb\r\n.\c
C: 550 *
P: QUIT
C: 221 *
END
}

# If the reply to DATA is 2xx or 503, the message is neither delivered nor returned (RFC 5321, 4.1.1.4).
t_nonsense_in_reply_to_data() {
    local reply
    provider
    put_letter one 1.a a@example.edu eva@example.org
    for OFFER in '' PIPELINING; do
        for reply in '250 taken' '220 hello' '503 5.5.1 RCPT first'; do
            until_true claimable "$T/queue/example.org/new/1.a"
            ANSWERS=([DATA]=$reply)
            turn
            equal "$N_GOT $(waiting)" '0 1' "$reply"
        done
    done
}

# A message for 250 recipients is sent in transactions of 100, the number that every server must accept (RFC 5321,
# 4.5.3.1.8). One recipient is deferred, and only that one is not struck out in the file.
t_many_recipients() {
    local file=$T/queue/example.org/new/1.a
    provider
    put_letter one 1.a a@example.edu r{1..250}@example.org
    OFFER='PIPELINING CHUNKING'
    ANSWERS['RCPT TO:<r7@example.org>']='451 4.3.0 later'
    turn
    equal "$N_GOT" 3
    equal "$(grep -ch '^RCPT' "$T"/got/* | tr '\n' ' ')" '99 100 50 '
    equal "$(cat "$file")" \
        "$(printf 'Return-Path: <a@example.edu>\n';
            printf 'Delivered-To: r%s\n' {1..6}=example.org 7@example.org {8..250}=example.org; letter one)"
    ANSWERS=()
    turn
    equal "$(waiting)" 0
}

# A recipient that a file names twice is sent once and struck out in both places (RFC 5321, 2.4).
t_the_same_recipient_twice() {
    provider
    put_letter one 1.a a@example.edu eva@example.org bob@example.org eva@EXAMPLE.org Eva@example.org
    ANSWERS=(['RCPT TO:<bob@example.org>']='450 later'); turn
    equal "$(grep -h '^RCPT' "$T/got/1" | xargs)" 'RCPT TO:<eva@example.org> RCPT TO:<Eva@example.org>'
    until_true settled
    equal "$(owed 1.a)" bob@example.org
    ANSWERS=(); turn
    until_true settled
    equal "$N_GOT $(waiting)" '1 0'
}

# <postmaster> without a domain is postmaster of the first domain in ATRN, or else of the first domain that mail was
# stored for (RFC 5321, 4.5.1). If ATRN has no domain, the summary names the domains.
t_postmaster_without_a_domain() {
    serve peer_to_postmaster
    customer 0 "127.0.0.1:$PORT" example.org example.com
    peer_ok
    has "$T"/mail/example.org/new/* '^Delivered-To: postmaster@example.org$'
    has "$T/err" ' octets received$'
    rm -r "$T/mail"
    serve peer_to_some_postmaster
    customer 0 "127.0.0.1:$PORT"
    peer_ok
    equal "$(mailbox)" 1
    equal "$(mailbox mail.example.com)" 2
    has "$T/err" ' 3 messages, [0-9]* octets received for mail.example.com,example.org$'
}
peer_to_postmaster() { reverse; store PostMaster; ask QUIT '^221 '; }
peer_to_some_postmaster() {
    reverse
    dialogue <<'END'
P: MAIL FROM:<a@b.example>
C: 250 *
P: RCPT TO:<postmaster>
C: 450 4.7.1 *
P: RCPT TO:<x@localhost>
C: 450 4.7.1 *
P: RSET
C: 250 *
END
    store eva@mail.example.com; store bob@example.org; store postmaster; ask QUIT '^221 '
}

# The customer takes a message for 32 domains, because each needs an open file, and replies 452 to the others (RFC 5321,
# 4.5.3.1.10).
t_recipients_in_very_many_domains() {
    serve peer_with_many_domains
    customer 0 "127.0.0.1:$PORT"
    peer_ok
    equal "$(find "$T/mail" -path '*/new/*' | wc -l)" 32
}
peer_with_many_domains() {
    local n
    reverse
    ask 'MAIL FROM:<a@b.example>' '^250 '
    for n in {1..32}; do ask "RCPT TO:<x@d$n.example>" '^250 '; done
    dialogue <<'END'
P: RCPT TO:<x@d33.example>
C: 452 4.5.3 *
P: RCPT TO:<y@D7.example>
C: 250 *
P: DATA
C: 354 *
P: Subject: x
P: .
C: 250 *
P: QUIT
C: 221 *
END
}

# The limit of 32 domains a message counts a domain once, however many recipients it has (RFC 5321, 4.5.3.1.10).
t_domains_of_a_message_are_counted_once() {
    serve peer_with_two_recipients_a_domain
    customer 0 "127.0.0.1:$PORT"
    peer_ok
    equal "$(find "$T/mail" -path '*/new/*' | wc -l) $(cat "$T"/mail/*/new/* | grep -c '^Delivered-To: ')" '32 96'
}
peer_with_two_recipients_a_domain() {
    local n who
    reverse
    ask 'MAIL FROM:<a@b.example>' '^250 '
    for who in x y z; do for n in {1..32}; do ask "RCPT TO:<$who@d$n.example>" '^250 '; done; done
    ask 'RCPT TO:<x@d33.example>' '^452 4.5.3 '
    ask DATA '^354 '; say 'Subject: x'; ask . '^250 '; ask QUIT '^221 '
}

# The Received field has a safe name of the peer, a registered protocol keyword, and nothing of the content (RFC 5321,
# 4.4).
t_received_says_what_it_should() {
    serve peer_with_odd_names
    customer 0 "127.0.0.1:$PORT"
    peer_ok
    cat "$T"/mail/example.org/new/* > "$T/all"
    equal "$(grep -c '^Received: from unknown (127' "$T/all")" 2
    equal "$(grep -c '^Received: from \[IPv6:::1\] (127' "$T/all")" 1
    equal "$(sed -n 's/.* with \(.*\) (odmr.*/\1/p' "$T/all" | sort | xargs)" \
        "ESMTP${OVER_TLS:+S} SMTP UTF8SMTP${OVER_TLS:+S}"
    grep -B 1 '^ (a comment' "$T/all" > "$T/blank"
    equal "$(head -n 1 "$T/blank")" '' 'the line above the first of the content'
}
peer_with_odd_names() {
    reverse
    ask 'EHLO evil((((' '^250'; store eva@example.org
    dialogue <<'END'
P: EHLO [IPv6:::1]
C: ...
C: 250 *
P: MAIL FROM:<> SMTPUTF8
C: 250 *
P: RCPT TO:<eva@example.org>
C: 250 *
P: BDAT 13 LAST\r\n (a comment\r\n\c
C: 250 *
END
    ask 'HELO x"y' '^250'; store eva@example.org
    ask QUIT '^221 '
}

# A message with more than 100 Received fields is refused with 554 (RFC 5321, 6.3).
t_a_loop_of_mail_is_refused() {
    serve peer_loop
    customer 0 "127.0.0.1:$PORT"
    peer_ok
    equal "$(mailbox)" 1
}
peer_loop() {
    local n i
    reverse
    for n in 100 101; do
        ask 'MAIL FROM:<a@b.example>' '^250 '; ask 'RCPT TO:<x@example.org>' '^250 '; ask DATA '^354 '
        for ((i = 0; i < n; i += 2)); do
            say 'RECEIVED: from a by b'; [ $((i + 1)) = "$n" ] || say $'Received \t: from b by c'
        done
        say ''; say 'Received: not a header any more'
        if [ "$n" = 100 ]; then ask . '^250 '; else ask . '^554 '; fi
    done
    ask QUIT '^221 '
}

# The provider can send to each address that enqueue and the customer accept, and holds mail with an address that they
# refuse (RFC 5321, 4.1.2; RFC 6531, 3.3).
t_one_definition_of_a_mailbox() {
    local address
    mkdir -p "$T/queue/example.org/new"
    cat > "$T/senders" <<'END'
s..t@example.edu
.s.@example.edu
s@under_score.example
s@[192.0.2.1]
s@[IPv6:2001:db8::1]
"a b"@example.edu
"a\"@b"@example.edu
!#$%&'*+-/=?^_`{|}~s@localhost
zo\xc3\xab@ex\xc3\xa4mple.edu
END
    cat > "$T/bad" <<'END'
s
@example.org
s@
a@b@example.org
a"b"c@example.org
"a"b@example.org
"a@example.org
s@x.org:25
s@x.org,c
s@example..org
s@.example.org
s@example.org.
s t@example.org
s@[127.0.0.1
s@[300.1.1.1]
s@[x]
|/bin/sh
s\xc3@example.org
\xff\xfe@example.org
s(c)@example.org
<s@example.org>
END
    for file in senders bad; do printf '%b\n' "$(sed 's/\\"/\\\\"/g' "$T/$file")" > "$T/$file.raw"; done
    while IFS= read -r address; do
        run 0 "$ODMR" enqueue -q "$T/queue" -f "$address" eva@example.org < /dev/null
    done < "$T/senders.raw"
    while IFS= read -r address; do
        run 65 "$ODMR" enqueue -q "$T/queue" -f "$address" eva@example.org < /dev/null
        run 65 "$ODMR" enqueue -q "$T/queue" "$address" < /dev/null
        printf 'Return-Path: <%s>\nDelivered-To: eva@example.org\n\nx\n' "$address" \
            > "$T/queue/example.org/new/bad.$((n = ${n:-0} + 1))"
    done < "$T/bad.raw"
    for address in s@under_score.org 's@[192.0.2.1]' $'s@ex\xc3\xa4mple.org'; do
        run 65 "$ODMR" enqueue -q "$T/queue" "$address" < /dev/null
    done
    provider
    login; ask ATRN '^250 '; OFFER='PIPELINING CHUNKING 8BITMIME SMTPUTF8'; take_mail; hang_up
    same "$T/senders.raw" <(cat "$T"/got/* | sed -n 's/^MAIL FROM:<\(.*\)> *\(SMTPUTF8\)*$/\1/p') \
        'the senders that arrived'
    equal "$(grep -c 'held example.org/new/bad' "$LOG")" "$(wc -l < "$T/bad")" 'bad senders that are held'
    serve peer_with_addresses
    customer 1 "127.0.0.1:$PORT"
    peer_ok
}
peer_with_addresses() {
    local address
    reverse
    while IFS= read -r address; do ask "MAIL FROM:<$address>" '^250 '; ask RSET '^250 '; done < "$T/senders.raw"
    while IFS= read -r address; do
        ask "MAIL FROM:<$address>" '^501 '
        ask 'MAIL FROM:<>' '^250 '; ask "RCPT TO:<$address>" '^501 '; ask RSET '^250 '
    done < "$T/bad.raw"
    ask QUIT '^221 '
}

# A message of 20 MB arrives unchanged in the three ways of sending, at other receivers and at the customer (RFC 5321,
# 4.5.3.1.7).
t_a_message_of_20_megabytes() {
    local way
    provider
    { printf 'Subject: big\n\n'; openssl rand -base64 15000000; } > "$T/big"
    for way in -e -p '' ; do
        sink $way
        put 1.a a@example.edu eva@example.org < "$T/big"
        ODMR_SECRET=tanstaaf run 0 "$ODMR" customer -u example.org --smtp "127.0.0.1:$SINK" "127.0.0.1:$PORT"
        cp "$T"/sink/* "$T/got" # smtp-sink adds fields at the start and an empty line at the end
        equal "$(sed -n '/^Subject: big/,$p' "$T/got" | sed '$d' | cksum)" "$(cksum < "$T/big")"
        rm "$T"/sink/*
    done
    put 1.a a@example.edu eva@example.org < "$T/big"
    customer 0 "127.0.0.1:$PORT"
    stored | cmp - "$T/big" || fail 'our own customer has something else'
}

# Pipelined messages are accepted after they are on disk, and a message that cannot be stored does not affect the others
# (RFC 5321, 4.2.5).
t_answers_wait_for_the_disk() {
    serve peer_in_a_hurry
    mkdir -p "$T/mail/example.com"; touch "$T/mail/example.com/tmp"
    customer 73 --trace "127.0.0.1:$PORT"
    peer_ok
    equal "$(mailbox)" 21
    equal "$(ls "$T/mail/example.org/tmp")" ''
}
peer_in_a_hurry() {
    local n
    reverse
    for n in {1..20}; do
        printf 'MAIL FROM:<a@b.example>\r\nRCPT TO:<x@example.org>\r\nBDAT 4 LAST\r\nn: %d' $((n % 10))
    done > "$T/hurry"
    printf 'MAIL FROM:<a@b.example>\r\nRCPT TO:<x@example.com>\r\nBDAT 4 LAST\r\nn: x' >> "$T/hurry"
    printf 'MAIL FROM:<a@b.example>\r\nRCPT TO:<x@example.org>\r\nBDAT 4 LAST\r\nn: yNOOP\r\nQUIT\r\n' >> "$T/hurry"
    cat "$T/hurry" >&"$LINE_OUT"
    for n in {1..20}; do expect '^250 2.1.0'; expect '^250 2.1.5'; expect '^250 .* stored'; done
    expect '^250 2.1.0'; expect '^250 2.1.5'; expect '^452 4.3.1'
    expect '^250 2.1.0'; expect '^250 2.1.5'; expect '^250 .* stored'
    expect '^250 2.0.0 OK$'; expect '^221 '
}

# If the connection ends before the customer's final reply, the message is not stored, so it cannot arrive twice (RFC
# 5321, 4.5.3.2.6).
t_no_answer_no_message() {
    unset OVER_TLS # this test speaks in the clear
    local pid
    serve peer_that_goes
    ODMR_SECRET=tanstaaf "$ODMR" customer -u example.org -q "$T/mail" "127.0.0.1:$PORT" 2> "$T/err" & pid=$!
    STARTED+=("$pid")
    until_true [ -e "$T/reversed" ]
    kill -STOP "$pid"
    touch "$T/stopped"
    until_true [ -e "$T/gone" ]; moment 0.3
    kill -CONT "$pid"
    wait "$pid"
    equal $? 75 'exit of the customer'
    peer_ok
    equal "$(find "$T/mail" -type f | wc -l)" 0
}
peer_that_goes() {
    reverse; touch "$T/reversed"; until_true [ -e "$T/stopped" ]
    printf 'MAIL FROM:<a@b.example>\r\nRCPT TO:<x@example.org>\r\nBDAT 4 LAST\r\nn: 1'; touch "$T/gone"
}

# If half a command has arrived, the customer replies to the commands before it without waiting (RFC 2920, 3.2).
t_answers_do_not_wait_for_half_a_command() {
    serve peer_with_half_a_command
    customer 0 "127.0.0.1:$PORT"
    peer_ok
    equal "$(mailbox)" 1
}
peer_with_half_a_command() {
    reverse
    printf 'MAIL FROM:<a@b.example>\r\nRCPT TO:<x@example.org>\r\nBDAT 4 LAST\r\nn: 1QU' > "$T/half"
    cat "$T/half" # in one write; bash's printf writes each line separately
    dialogue <<'END'
C: 250 2.1.0 *
C: 250 2.1.5 *
C: 250 * stored*
P: IT
C: 221 *
END
}

# ---- RFC 4954: AUTH, and the SASL mechanisms ---------------------------------------------------------

# scram_by_hand NAME SECRET HEADER: plays SCRAM up to the proof; the caller expects the reply. NONCE, CHANNEL and PROOF,
# if set, replace the right values.
scram_by_hand() {
    local bare="n=$1,r=fyko+d2lbbFgONRv9qkxdawL" challenge nonce final
    [ -n "${DIALLED:-}" ] || open_session
    ask "AUTH SCRAM-SHA-256 $(b64 "$3$bare")" '^334 '
    challenge=$(unb64 "${ANSWER#334 }")
    match "$challenge" '^r=fyko\+d2lbbFgONRv9qkxdawL.+,s=.+,i=4096$'
    nonce=${challenge%%,*}
    final="c=${CHANNEL:-$(b64 "$3")},r=${NONCE:-${nonce#r=}}"
    scram "$2" "$bare" "$challenge" "$final"
    say "$(b64 "$final,p=${PROOF:-$PROOF_OF_IT}")"
}

# A response that is not base64 has the reply 501, and the third failed authentication ends the session with 421; each
# failure takes a second (RFC 4954, 4 and 6).
t_bad_base64_and_three_failures() {
    local start
    provider
    each_row cram_md5_gets <<'END'
!!!! | 501 | RFC 4954, 4: no base64
YWJj= | 501 | RFC 4648, 4: a = too many
END
    open_session
    each_row ask_raw <<'END'
AUTH SCRAM-SHA-256 !!!!  | 501 | RFC 4954, 4: no base64
AUTH SCRAM-SHA-256 YWJj= | 501 | RFC 4648, 4: a = too many
AUTH SCRAM-SHA-256 YW=j  | 501 | one in the middle
AUTH SCRAM-SHA-256 YWJ   | 501 | a = that is missing
AUTH SCRAM-SHA-256 ====  | 501 | nothing else
AUTH FROB                | 504 | RFC 4954, 4: no such mechanism
AUTH                     | 501 | RFC 4954, 4: it names a mechanism
AUTH CRAM-MD5 YWJj       | 501 | RFC 2195: the server speaks first
END
    start=$(date +%s%N)
    auth_cram_md5 example.org wrong '^535 '
    auth_cram_md5 nobody tanstaaf '^535 '
    dialogue <<END
C: AUTH CRAM-MD5
P: 334 *
C: $(b64 'no digest')
P: 535 *
P: 421 *
P: (closes)
END
    [ $(($(date +%s%N) - start)) -ge 3000000000 ] || fail 'failures were answered too fast'
    login
}
# cram_md5_gets RESPONSE CODE: sends this response to CRAM-MD5 in a new session, which continues after the reply CODE.
cram_md5_gets() {
    open_session
    dialogue <<END
C: AUTH CRAM-MD5
P: 334 *
C: $1
P: $2 *
C: NOOP
P: 250 *
C: (closes)
END
}

# An exchange that ends with an asterisk, a response that is not base64, or too long a line, is a failed authentication
# and takes a second; the third ends the session (RFC 4954, 4).
t_cancelled_exchanges_count_as_failed() {
    local start way
    provider
    for way in '*' '!!!!' "$(head -c 12300 /dev/zero | tr '\0' A)"; do
        (
            open_session
            start=$(date +%s%N)
            for _ in 1 2 3; do ask "AUTH SCRAM-SHA-256 $(b64 n,,n=nobody,r=abc)" '^334 '; ask "$way" '^50[01] '; done
            expect '^421 .*too many failed authentications'; closed
            [ $(($(date +%s%N) - start)) -ge 3000000000 ] || fail "$way was answered too fast"
        ) || exit 1
    done
    equal "$(grep -c ': SCRAM-SHA-256, Authentication cancelled, attempt [123] of 3$' "$LOG")" 3
}

# A response or initial response that is not canonical base64 has the reply 501, and the session continues (RFC 4648,
# 3.5 and 4; RFC 4954, 4).
# not with: OVER_TLS
t_auth_responses_that_are_not_base64() {
    provider --max-per-address 100
    each_row no_base64_gets <<'END'
AAA      | a = that is missing
A===     | six bits are no octet
AA=A     | a letter after =
AAAA==== | nothing but = at the end
AA AA    | a blank
!!!!     | no letter of base64
AAAA=AAA | a = in the middle
YQ=      | one = of two
AA\x80A  | an octet over 127
END
    open_session
    ask 'AUTH CRAM-MD5' '^334 '; ask "$(head -c 12287 /dev/zero | tr '\0' A)" '^500 '
    ask 'AUTH CRAM-MD5' '^334 '; ask "$(head -c 12284 /dev/zero | tr '\0' A)" '^535 '
    each_row ask_raw <<END
AUTH CRAM-MD5 $(b64 x) | 501 | RFC 2195: the server speaks first
AUTH                   | 501 | RFC 4954, 4: it names a mechanism
AUTH ROT13             | 504 | RFC 4954, 4: no such mechanism
END
}
no_base64_gets() {
    cram_md5_gets "$1" 501
    open_session
    ask_raw "AUTH SCRAM-SHA-256 $1" '50[01]' "$2"
    ask NOOP '^250 '
    hang_up
}

# If a challenge is not base64, the customer cancels the exchange with an asterisk (RFC 4954, 4).
t_challenge_that_is_no_base64() {
    serve peer_without_base64
    customer 76 "127.0.0.1:$PORT"
    peer_ok
}
peer_without_base64() {
    offer_mechanisms CRAM-MD5
    dialogue <<'END'
C: AUTH CRAM-MD5
P: 334 ???
C: \*
P: 501 cancelled
C: QUIT
P: 221 bye
END
}

# The customer's response to the challenge in the example of RFC 2195, 2, is that of the example.
# not with: OVER_TLS
t_cram_md5_of_the_rfc() {
    serve rfc2195
    ODMR_SECRET=tanstaaftanstaaf run 1 "$ODMR" customer -u tim -q "$T/mail" --mechanism CRAM-MD5 "127.0.0.1:$PORT"
    peer_ok
}
rfc2195() {
    offer_mechanisms CRAM-MD5
    dialogue <<END
C: AUTH CRAM-MD5
P: 334 $(b64 '<1896.697170952@postoffice.reston.mci.net>')
C: $(b64 'tim b913a602c7eda7a495b4e6e7334d3890')
P: 235 welcome
END
    no_mail
}

# PLAIN cannot authorize another account than its own, and its response is never in the provider's trace (RFC 4616, 2).
# not with: OVER_TLS
t_plain_by_hand() {
    tls_provider --trace
    tunnel
    each_row plain_by_hand <<'END'
\0example.org\0tanstaaf            | 235 | RFC 4616, 2: no authorization identity
example.org\0example.org\0tanstaaf | 235 | the account's own
other\0example.org\0tanstaaf       | 535 | another account's
\0example.org\0tanstaaf\0x         | 535 | a part too many
\0example.org\0wrong               | 535 | a wrong password
\0example.org                      | 535 | no password
                                   | 535 | nothing at all
END
    equal "$(grep -c 'authenticated as example.org (PLAIN, ' "$LOG")" 4
    equal "$(grep -c 'C: AUTH PLAIN (response not shown)$' "$LOG") $(grep -c 'C: (response not shown)$' "$LOG")" '7 7'
    dial; expect '^220'; ask $'auth \tplain\tmy secret' '^500 '; ask 'AUTH  PLAIN my secret' '^503 '
    hasnt "$LOG" 'my secret'
}
# Sends the response as initial response, and as the response to an empty challenge.
plain_by_hand() {
    local response
    response=$(encoded "$1")
    open_session
    ask_raw "AUTH PLAIN ${response:-=}" "$2" "$3"
    hang_up
    open_session
    ask 'AUTH PLAIN' '^334 $'; ask_raw "$response" "$2" "$3"
    hang_up
    [ -z "$response" ] || ! grep -qF "$response" "$LOG" || fail "$response is in the trace"
}

# If a provider offers only PLAIN in the clear, the customer sends no secret and ends the session (RFC 4616, 3; RFC
# 4954, 4).
# not with: OVER_TLS
t_plain_never_leaves_in_the_clear() {
    serve only_plain
    customer 77 --trace "127.0.0.1:$PORT"
    peer_ok
    customer 77 --trace --insecure "127.0.0.1:$PORT"
    peer_ok
    has "$T/err" 'no usable SASL mechanism: .* offers'
    hasnt "$T/err" 'C: AUTH'
}
only_plain() { offer_mechanisms PLAIN; goodbye; }

# If a response has a NUL octet, the octets after it count, so the response is wrong (RFC 4954, 4).
# not with: OVER_TLS
t_responses_with_a_nul_octet() {
    local bare=n=example.org,r=abc challenge final
    provider
    open_session
    ask 'AUTH CRAM-MD5' '^334 '
    ask "$(encoded "example.org $(hmac_md5 tanstaaf "$(unb64 "${ANSWER#334 }")")\0x")" '^535 '
    ask "AUTH SCRAM-SHA-256 $(encoded "n,,$bare\0x")" '^535 '
    ask "AUTH SCRAM-SHA-256 $(b64 "n,,$bare")" '^334 '
    challenge=$(unb64 "${ANSWER#334 }")
    final="c=biws,${challenge%%,*}"
    scram tanstaaf "$bare" "$challenge" "$final"
    ask "$(encoded "$final,p=$PROOF_OF_IT\0x")" '^535 '
}

# SCRAM-SHA-256 by hand: the provider's signature is right, and a second AUTH has the reply 503 (RFC 7677; RFC 4954, 4).
# not with: OVER_TLS
t_scram_by_hand() {
    provider
    scram_by_hand example.org tanstaaf n,,
    expect '^334 '
    equal "$(unb64 "${ANSWER#334 }")" "v=$SIGNATURE"
    ask '' '^235 now authenticated as example.org$'
    ask ATRN '^453 '
    ask "AUTH SCRAM-SHA-256 $(b64 n,,n=x,r=y)" '^503 '
}

# Both sides compute the example of RFC 7677, 3, in .ci/vectors.c, which can set the nonces.
# not with: OVER_TLS
t_scram_of_the_rfc() {
    make -s -C "$here" build/vectors || fail 'not built'
    run 0 "$here/build/vectors"
    equal "$(grep -c '^ok ' "$T/out")" 9
}

# A final message of SCRAM with a wrong secret, nonce, channel binding, proof or name has the reply 535 (RFC 5802, 5.1).
# not with: OVER_TLS
t_scram_attacks() {
    provider
    scram_by_hand example.org wrong n,,; expect '^535 '
    NONCE=fyko+d2lbbFgONRv9qkxdawL scram_by_hand example.org tanstaaf n,,; expect '^535 '
    NONCE=fyko+d2lbbFgONRv9qkxdawLanother scram_by_hand example.org tanstaaf n,,; expect '^535 '
    CHANNEL=$(b64 y,,) scram_by_hand example.org tanstaaf n,,; expect '^535 '
    PROOF=$(b64 short) scram_by_hand example.org tanstaaf n,,; expect '^535 '
    scram_by_hand nobody tanstaaf n,,; expect '^535 '
}

# A first message of SCRAM that breaks its grammar has the reply 535 (RFC 5802, 7).
# not with: OVER_TLS
t_scram_bad_first_messages() {
    provider --max-per-address 100
    each_row first_message_gets <<END
n,,                                  | 535 | no name
x,,n=example.org,r=a                 | 535 | a flag of channel binding that does not exist
n,,n=example.org,r=                  | 535 | an empty nonce
n,,n=example.org                     | 535 | no nonce
n,,m=1,n=example.org,r=a             | 535 | an extension that must be understood, and is not
n,,n=,r=a                            | 535 | an empty name
n,,n=example.org,r=a b               | 535 | a blank in the nonce
n,,n=example.org,r=a\\tb              | 535 | a tab in it
n,,n=example.org,r=a\\xc3\\xa9         | 535 | UTF-8 in it
n,,n=exam=2ple,r=a                   | 535 | an equals sign that is neither =2C nor =3D
p=tls-exporter,,n=example.org,r=a    | 535 | RFC 5802, 6: channel binding without -PLUS
n,a=other,n=example.org,r=a          | 535 | another authorization identity
n,b=x,n=example.org,r=a              | 535 | something else in its place
n,,n=example.org,r=$(head -c 600 /dev/zero | tr '\0' a) | 535 | a nonce of 600 octets
END
}
first_message_gets() {
    open_session
    ask_raw "AUTH SCRAM-SHA-256 $(encoded "$1")" "$2" "$3"
    ask 'AUTH SCRAM-SHA-256 =' '^535 '
    hang_up
}

# A proof that is bound to another TLS channel has the reply 535 (RFC 5802, 6; RFC 9266).
# not with: OVER_TLS
t_scram_wrong_channel() {
    tls_provider
    tunnel
    open_session
    ask "AUTH SCRAM-SHA-256-PLUS $(b64 n,,n=example.org,r=abc)" '^535 '
    ask "AUTH SCRAM-SHA-256-PLUS $(b64 p=tls-unique,,n=example.org,r=abc)" '^535 '
    ask "AUTH SCRAM-SHA-256-PLUS $(b64 p=tls-exporter,,n=example.org,r=abc)" '^334 '
    first=$(unb64 "${ANSWER#334 }")
    final="c=$(b64 "p=tls-exporter,,xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"),${first%%,*}"
    scram tanstaaf n=example.org,r=abc "$first" "$final"
    ask "$(b64 "$final,p=$PROOF_OF_IT")" '^535 '
    expect '^421 '
}

# If an attacker has removed -PLUS from the offer, the provider refuses the customer's flag y (RFC 5802, 6).
# not with: OVER_TLS
t_scram_downgrade() {
    tls_provider
    tunnel
    open_session
    ask "AUTH SCRAM-SHA-256 $(b64 'y,,n=example.org,r=abcdef')" '^535 '
    hang_up
    # without TLS there is no channel to bind to, so the flag y of a client that can bind is accepted
    provider
    scram_by_hand example.org tanstaaf y,,
    expect '^334'; ask '' '^235 '
}

# SCRAM-SHA-256-PLUS binds to tls-exporter with TLS 1.3, and to tls-server-end-point with older TLS (RFC 9266; RFC 5929,
# 4).
# not with: OVER_TLS
t_channel_bindings() {
    printf 'openssl_conf = o\n[o]\nssl_conf = s\n[s]\nsystem_default = d\n[d]\nMaxProtocol = TLSv1.2\n' > "$T/old.cnf"
    tls_provider
    OPENSSL_CONF=$T/old.cnf customer 1 --trace --mechanism SCRAM-SHA-256-PLUS --ca "$T/ca.crt" "localhost:$PORT"
    match "$(unb64 "$(sed -n 's/.*AUTH SCRAM-SHA-256-PLUS //p' "$T/err")")" '^p=tls-server-end-point,,n='
    customer 1 --trace --mechanism SCRAM-SHA-256-PLUS --ca "$T/ca.crt" "localhost:$PORT"
    match "$(unb64 "$(sed -n 's/.*AUTH SCRAM-SHA-256-PLUS //p' "$T/err")")" '^p=tls-exporter,,n='
}

# The customer's flag is y inside TLS when -PLUS was not offered, and n when it does not bind (RFC 5802, 6).
# not with: OVER_TLS
t_customer_says_whether_it_could_bind() {
    OVER_TLS=1 serve flag_y
    customer 77 --tls --ca "$T/ca.crt" "localhost:$PORT"
    peer_ok
    serve flag_n
    customer 77 "localhost:$PORT"
    peer_ok
    OVER_TLS=1 serve flag_n_though_plus
    customer 77 --tls --ca "$T/ca.crt" --mechanism SCRAM-SHA-256 "localhost:$PORT"
    peer_ok
}
flag_y() { hear_flag y SCRAM-SHA-256; }
flag_n() { hear_flag n SCRAM-SHA-256; }
flag_n_though_plus() { hear_flag n SCRAM-SHA-256 SCRAM-SHA-256-PLUS; }
hear_flag() {
    local flag=$1
    shift
    offer_mechanisms "$@"
    expect_line '^AUTH SCRAM-SHA-256 '
    match "$(unb64 "${HEARD##* }")" "^$flag,,n=example.org,r="
    say '535 no'; goodbye
}

# If the provider's nonce, salt, count or signature is not valid, the customer ends the session without ATRN (RFC 5802,
# 5.1; RFC 7677, 4).
# not with: OVER_TLS
t_customer_and_scram_impostors() {
    local impostor
    each_row refuses_challenge <<'END'
r=fyko+d2lbbFgONRv9qkxdawLfyko+d2lbbFgONRv9,s=QSXCR+Q6sek8bf92,i=4096 | as long as ours, but of another client
r=NONCE,s=QSXCR+Q6sek8bf92,i=4096            | the client's nonce alone
r=NONCEx y,s=QSXCR+Q6sek8bf92,i=4096         | a blank in the nonce
r=NONCEx,s=QSXCR+Q6sek8bf92,i=1              | RFC 7677, 4: fewer rounds than 4096
r=NONCEx,s=QSXCR+Q6sek8bf92,i=+4096          | RFC 5802, 7: a count has no sign
r=NONCEx,s=QSXCR+Q6sek8bf92,i=4096,i=4096    | and stands there once
r=NONCEx,s=QSXCR+Q6sek8bf92,i=1000001        | more rounds than the customer computes
r=NONCEx,s=QSXCR+Q6sek8bf92,i=2147483648     | more than an int holds
r=NONCEx,i=4096                              | no salt
END
    for impostor in scram_wrong_signature scram_no_signature; do
        serve "$impostor"
        customer 77 --trace "127.0.0.1:$PORT"
        peer_ok
        hasnt "$T/err" 'C: ATRN'
    done
    for impostor in scram_honest scram_extended; do
        serve $impostor
        customer 1 "127.0.0.1:$PORT"
        peer_ok
    done
}
# scram_serve CHALLENGE: sends the challenge, in which NONCE stands for the customer's nonce. Sets FINAL to the
# customer's final message.
scram_serve() {
    offer_mechanisms SCRAM-SHA-256 CRAM-MD5 PLAIN
    expect_line '^AUTH SCRAM-SHA-256 '
    BARE=$(unb64 "${HEARD##* }"); BARE=${BARE#n,,}
    CHALLENGE=${1//NONCE/${BARE##*r=}}
    say "334 $(b64 "$CHALLENGE")"
    hear || fail 'no answer to the challenge'
    FINAL=$(unb64 "$HEARD")
}
refuses_challenge() {
    OFFERED=$1 serve scram_refused
    customer 77 --trace "127.0.0.1:$PORT"
    peer_ok
    hasnt "$T/err" 'C: ATRN'
}
scram_refused() {
    scram_serve "$OFFERED"
    equal "$HEARD" '*'
    dialogue <<'END'
P: 501 cancelled
C: QUIT
P: 221 bye
END
}
scram_wrong_signature() {
    scram_serve 'r=NONCEx,s=QSXCR+Q6sek8bf92,i=4096'
    scram wrong "$BARE" "$CHALLENGE" "${FINAL%,p=*}"
    say "334 $(b64 "v=$SIGNATURE")"
    ! hear || fail "more came: $HEARD"
}
scram_no_signature() {
    scram_serve 'r=NONCEx,s=QSXCR+Q6sek8bf92,i=4096'; say '235 welcome'; ! hear || fail "more came: $HEARD"
}
scram_honest() {
    scram_serve 'r=NONCEx,s=QSXCR+Q6sek8bf92,i=4096'
    scram tanstaaf "$BARE" "$CHALLENGE" "${FINAL%,p=*}"
    equal "${FINAL##*,p=}" "$PROOF_OF_IT"
    say "334 $(b64 "v=$SIGNATURE")"
    expect_line '^$'
    say '235 welcome'; no_mail
}
# This provider adds an extension after the count and after the signature (RFC 5802, 7).
scram_extended() {
    scram_serve 'r=NONCEx,s=QSXCR+Q6sek8bf92,i=4096,x=more'
    scram tanstaaf "$BARE" "$CHALLENGE" "${FINAL%,p=*}"
    equal "${FINAL##*,p=}" "$PROOF_OF_IT"
    say "334 $(b64 "v=$SIGNATURE,x=more")"
    expect_line '^$'
    say '235 welcome'; no_mail
}

# If OpenSSL fails during an exchange, the reply is 454, and the next exchange in the session succeeds (RFC 4954, 4).
# not with: OVER_TLS
t_openssl_fails_in_the_middle_of_scram() {
    local n bare=n=example.org,r=abc challenge final
    cc -shared -fPIC -o "$T/failing.so" -xc - << 'END' || fail 'not built'
#define _GNU_SOURCE
#include <dlfcn.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <openssl/rand.h>
#include <stdlib.h>
#include <sys/socket.h>
static int left = -1;
#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
int accept4(int fd, struct sockaddr *a, socklen_t *len, int flags)
{
    int got = NEXT(accept4)(fd, a, len, flags);
    left = atoi(getenv("FAIL_AT"));
    return got;
}
int RAND_bytes(unsigned char *out, int n) { return --left == 0 ? 0 : NEXT(RAND_bytes)(out, n); }
unsigned char *HMAC(const EVP_MD *md, const void *key, int key_len, const unsigned char *d, size_t n,
    unsigned char *out, unsigned *len)
{ return --left == 0 ? NULL : NEXT(HMAC)(md, key, key_len, d, n, out, len); }
int PKCS5_PBKDF2_HMAC(const char *pass, int len, const unsigned char *salt, int salt_len, int rounds, const EVP_MD *md,
    int n, unsigned char *out)
{ return --left == 0 ? 0 : NEXT(PKCS5_PBKDF2_HMAC)(pass, len, salt, salt_len, rounds, md, n, out); }
int EVP_Digest(const void *d, size_t n, unsigned char *out, unsigned *len, const EVP_MD *md, ENGINE *e)
{ return --left == 0 ? 0 : NEXT(EVP_Digest)(d, n, out, len, md, e); }
END
    for n in {1..20}; do
        AROUND=(env FAIL_AT="$n" ASAN_OPTIONS=verify_asan_link_order=0 LD_PRELOAD="$T/failing.so")
        provider
        open_session
        ask "AUTH SCRAM-SHA-256 $(b64 "n,,$bare")" '^(334|454) '
        if [[ $ANSWER == 334* ]]; then
            challenge=$(unb64 "${ANSWER#334 }")
            final="c=biws,${challenge%%,*}"
            scram tanstaaf "$bare" "$challenge" "$final"
            ask "$(b64 "$final,p=$PROOF_OF_IT")" '^(334|454) '
            [[ $ANSWER != 334* ]] || break
        fi
        has "$LOG" 'AUTH answered 454: OpenSSL cannot compute the digests$'
        DIALLED=1 scram_by_hand example.org tanstaaf n,,
        expect '^334 '; ask '' '^235 '
        stop_provider
    done
    equal "$n" 10 'the first call that is none of the exchange'
}

# No part of a verifier in the accounts file can be used to log in (RFC 5802, 9).
# not with: OVER_TLS
t_verifier_is_no_secret() {
    local verifier part
    accounts; echo s3cret | run 0 "$ODMR" account --scram verifier example.org
    cat "$T/out" >> "$T/accounts"
    provider
    verifier=$(cut -d: -f3 "$T/out")
    for part in "$verifier" "${verifier#*\}}" ${verifier//[\},]/ }; do
        open_session
        auth_cram_md5 verifier "$part" '^535 '
        DIALLED=1 scram_by_hand verifier "$part" n,,; expect '^535 '
        hang_up
    done
}

# An unknown name, a wrong secret and an account with a verifier have the same challenge, reply and time (RFC 5802,
# 9). The verifier has many rounds, so the times would show a missing PBKDF2. With a sanitizer each round takes longer.
# not with: OVER_TLS
t_failures_tell_nothing() {
    local kind mechanism i tries=() rounds=100000
    [ -z "${SANITIZED:-}" ] || rounds=20000
    accounts; echo "verifier:example.org:$(verifier s3cret "$rounds")" >> "$T/accounts"
    tls_provider --max-per-address 200
    until
        for i in {1..9}; do for kind in example.org verifier nobody; do time_of_challenge "$kind"; done; done
        near_each_other "$(median example.org)" "$(median verifier)" "$(median nobody)"
    do # other load on the machine spoils some of the times
        tries+=(once)
        [ ${#tries[@]} -lt 5 ] || fail "medians in microseconds: $MEDIANS"
        rm "$T"/times.*
    done
    CLEAR=$PORT LATEST=$((1000000 + $(median example.org)))
    tunnel
    for mechanism in CRAM-MD5 PLAIN SCRAM-SHA-256; do
        tries=()
        for kind in example.org verifier nobody; do refusal "$mechanism" "$kind" & tries+=($!); done
        for i in "${tries[@]}"; do wait "$i" || exit 1; done
    done
    equal "$(cat "$T"/refusal.* | sort | uniq -c | sed 's/^ *//')" '9 535 Authentication failed'
    equal "$(cat "$T"/form.* | sort -u)" "16,i=$rounds" 'octets of salt and rounds'
}
# refusal MECHANISM NAME: checks that the refusal comes a second after the wrong response, whatever the provider has to
# compute. For PLAIN that is two PBKDF2, so LATEST is a second and one PBKDF2. A busy machine can delay the reply, so a
# late one is tried again. The time to make the response is not measured.
refusal() {
    local i before took
    [ "$1" = PLAIN ] || PORT=$CLEAR
    for i in {1..25}; do
        open_session
        "wrong_$1" "$2"
        before=${EPOCHREALTIME/./}
        ask "$RESPONSE" '^535 '
        took=$((${EPOCHREALTIME/./} - before))
        [ "$took" -gt 990000 ] || fail "$1, $2: after $took microseconds"
        [ "$took" -gt "$LATEST" ] || { echo "$ANSWER" > "$T/refusal.$1.$2"; return; }
        hang_up
    done
    fail "$1, $2: after $took microseconds, not $LATEST"
}
# wrong_MECHANISM NAME: plays the exchange up to the challenge; sets RESPONSE to a well-formed, wrong response.
wrong_CRAM-MD5() { ask 'AUTH CRAM-MD5' '^334 '; cram_response "$1" wrong "${ANSWER#334 }"; }
wrong_PLAIN() { ask 'AUTH PLAIN' '^334 $'; RESPONSE=$(encoded "\0$1\0wrong"); }
wrong_SCRAM-SHA-256() {
    local nonce salt rounds
    ask "AUTH SCRAM-SHA-256 $(b64 "n,,n=$1,r=abc")" '^334 '
    IFS=, read -r nonce salt rounds <<< "$(unb64 "${ANSWER#334 }")"
    echo "$(unb64 "${salt#s=}" | wc -c),$rounds" >> "$T/form.$1"
    RESPONSE=$(b64 "c=biws,$nonce,p=$(head -c 32 /dev/zero | openssl base64 -A)")
}
# time_of_challenge NAME: writes the microseconds from the name to the challenge to $T/times.NAME.
time_of_challenge() {
    local before line
    open_session
    line="AUTH SCRAM-SHA-256 $(b64 "n,,n=$1,r=abc")"
    before=${EPOCHREALTIME/./}
    ask "$line" '^334 '
    echo $((${EPOCHREALTIME/./} - before)) >> "$T/times.$1"
    hang_up
}
median() { sort -n "$T/times.$1" | sed -n "$(($(wc -l < "$T/times.$1") / 2 + 1))p"; }
near_each_other() { local a b; MEDIANS=$*; for a; do for b; do [ $((a * 2)) -gt "$b" ] || return 1; done; done; }

# A name without a verifier has the same salt after SIGHUP and after a restart, as a verifier has, and the most frequent
# count of the verifiers (RFC 5802, 9).
# not with: OVER_TLS
t_salts_tell_nothing() {
    local name before
    accounts
    { echo "dear:example.org:$(verifier x 100000)"; echo "cheap:example.org:$(verifier x 5000)"
      echo "2:example.org:$(verifier x 5000)"
    } >> "$T/accounts"
    salts() {
        open_session
        for name in example.org nobody cheap; do
            ask "AUTH SCRAM-SHA-256 $(b64 "n,,n=$name,r=abc")" '^334 '
            echo "$(unb64 "${ANSWER#334 }" | sed "s/^[^,]*,//")"
            ask '*' '^501 '
        done
        hang_up
    }
    provider
    before=$(salts)
    equal "$(grep -c 'i=5000$' <<< "$before")" 3
    equal "$(sort -u <<< "$before" | wc -l)" 3
    kill -HUP "$PROVIDER"; until_true shows "$LOG" 'accounts read again'
    equal "$(salts)" "$before" 'salts after SIGHUP'
    stop_provider
    provider
    equal "$(salts)" "$before" 'salts after a restart'
    echo 'new:example.org:x' >> "$T/accounts"
    stop_provider
    provider
    [ "$(salts)" != "$before" ] || fail 'salts that any other file has, too'
}

# EXTERNAL refuses a certificate for servers only, one that a customer's certificate signed, and one with a NUL octet in
# its name (RFC 5280, 4.2.1.12 and 6.1).
# not with: OVER_TLS
t_external_takes_no_other_certificate() {
    authority
    certificate me /CN=somebody DNS:example.org ca clientAuth
    certificate server_only /CN=example.org DNS:example.org ca serverAuth
    certificate leaf /CN=x DNS:other ca
    certificate by_leaf /CN=example.org DNS:example.org leaf
    cat "$T/leaf.crt" >> "$T/by_leaf.pem"
    certificate nul /CN=x "$(name_with_nul example.org)" ca
    tls_provider --client-ca "$T/ca.crt"
    external 1 me
    external 77 server_only; has "$T/err" 'no usable SASL mechanism: .* offers'
    external 77 by_leaf; has "$T/err" 'no usable SASL mechanism: .* offers'
    external 77 nul; has "$T/err" '535 '
    tunnel "$T/me.pem"
    dial; expect '^220'; ask 'EHLO x' EXTERNAL
    ask "AUTH EXTERNAL $(encoded 'example.org\0x')" '^535 '
    ask "AUTH EXTERNAL $(b64 example.org)" '^235 '
}

# ---- RFC 3207: STARTTLS ------------------------------------------------------------------------------

# s_client LINES [OPTION...]: sends the lines with OpenSSL's client, which writes the replies to $T/s_client.
s_client() {
    local lines=$1
    shift
    {
        sleep 0.5; printf '%b' "$lines"
    } | timeout "$PATIENCE" openssl s_client -connect "127.0.0.1:$PORT" -crlf -quiet \
        -CAfile "$T/ca.crt" -verify_return_error "$@" > "$T/s_client" 2> "$T/s_client.err"
}

# OpenSSL's client has a session over TLS 1.2 and 1.3, by STARTTLS and by implicit TLS, and none over TLS 1.1 (RFC 3207,
# 4; RFC 8996).
# shows: 5.1.1-b
# not with: OVER_TLS
t_starttls_with_openssl() {
    local version
    tls_provider
    for version in -tls1_2 -tls1_3; do
        s_client 'EHLO x\nATRN\nSTARTTLS\nQUIT\n' -starttls smtp -verify_hostname localhost "$version"
        has "$T/s_client" '^250-AUTH .*SCRAM-SHA-256-PLUS.* PLAIN'
        has "$T/s_client" '^250 ATRN'
        has "$T/s_client" '^530 '
        has "$T/s_client" '^503 TLS'
        has "$T/s_client" '^221 '
        hasnt "$T/s_client" '^250-STARTTLS'
    done
    ! s_client 'QUIT\n' -starttls smtp -tls1_1 -cipher DEFAULT@SECLEVEL=0 || fail 'TLS 1.1 was accepted'
    PORT=$TLS_PORT s_client 'EHLO x\nQUIT\n' -verify_hostname localhost
    has "$T/s_client" '^220 '
    has "$T/s_client" '^221 '
}

# The provider's replies to STARTTLS, and to the mechanisms that need TLS, fit its state (RFC 3207, 4; RFC 4954, 4).
# not with: OVER_TLS
t_starttls_replies() {
    tls_provider
    dialogue_on_a_new_connection <<'END'
P: 220 *
C: STARTTLS
P: 503 *
C: EHLO x
P: 250-example.net
P: 250-AUTH CRAM-MD5 SCRAM-SHA-256
P: 250-STARTTLS
P: 250 ATRN
C: STARTTLS now
P: 501 *
C: AUTH PLAIN AGEAYg==
P: 538 *
C: AUTH SCRAM-SHA-256-PLUS
P: 504 *
C: AUTH EXTERNAL =
P: 504 *
C: STARTTLS
P: 220 *
C: (closes)
END
    login
    dialogue <<'END'
C: EHLO x
P: 250-example.net
P: 250-AUTH CRAM-MD5 SCRAM-SHA-256
P: 250 ATRN
C: STARTTLS
P: 503 *
C: (closes)
END
    provider
    dialogue_on_a_new_connection <<'END'
P: 220 *
C: EHLO x
P: 250-example.net
P: 250-AUTH CRAM-MD5 SCRAM-SHA-256
P: 250 ATRN
C: STARTTLS
P: 502 *
C: AUTH PLAIN AGEAYg==
P: 504 *
END
}

# After STARTTLS the provider forgets the EHLO before it and discards octets received with it in the clear (RFC 3207,
# 4.2).
# not with: OVER_TLS
t_starttls_forgets() {
    tls_provider
    REAL_PORT=$PORT INJECT='NOOP\r\nEHLO evil\r\nHELP\r\n' serve man_in_the_middle
    s_client 'AUTH CRAM-MD5\nNOOP\nQUIT\n' -starttls smtp
    equal "$(cut -c1-3 "$T/s_client" | tr '\n' ' ')" '503 250 221 '
    has "$LOG" 'sent input after STARTTLS in the clear; it is discarded'
}
# An attacker between $REAL_PORT and the customer. The attacker removes reply lines with $STRIP, adds $INJECT after
# STARTTLS, and adds $INJECT_REPLY after its reply. After STARTTLS or ATRN all octets are passed on unchanged.
man_in_the_middle() {
    local line there
    exec {there}<> "/dev/tcp/127.0.0.1/$REAL_PORT"
    pass_reply
    while IFS= read -r line; do
        printf '%s\n' "$line" >> "$T/passed"
        if [[ $line == STARTTLS* ]]; then
            at_once "$line" "${INJECT:-}" >&"$there"
            IFS= read -r line <&"$there"
            at_once "$line" "${INJECT_REPLY:-}"
            break
        fi
        printf '%s\n' "$line" >&"$there"
        pass_reply
        [[ $line != ATRN* ]] || break
    done
    { cat <&"$there"; kill $BASHPID; } &
    cat >&"$there"
}
at_once() { printf '%s\n%b' "$1" "$2" > "$T/at_once"; cat "$T/at_once"; } # in one write, unlike printf
pass_reply() {
    local reply
    while IFS= read -r reply <&"$there"; do
        [[ -n ${STRIP:-} && $reply == *$STRIP* ]] || printf '%s\n' "$reply"
        [[ $reply == ???-* ]] || break
    done
}

# If an attacker removes STARTTLS, the customer sends no credentials with --require-tls or PLAIN, and SCRAM does not
# reveal them (RFC 3207, 6).
# not with: OVER_TLS
t_starttls_stripped() {
    tls_provider
    put_letter one 1.a a@example.edu eva@example.org
    REAL_PORT=$PORT STRIP=STARTTLS serve man_in_the_middle
    customer 69 --trace --require-tls --ca "$T/ca.crt" "localhost:$PORT"
    has "$T/err" 'does not offer STARTTLS'
    hasnt "$T/err" 'C: \(AUTH\|ATRN\)'
    customer 77 --trace --mechanism PLAIN --ca "$T/ca.crt" "localhost:$PORT"
    hasnt "$T/err" 'C: AUTH'
    customer 0 --trace --ca "$T/ca.crt" "localhost:$PORT"
    has "$T/err" 'C: AUTH SCRAM-SHA-256 '
    hasnt "$T/passed" 'PLAIN'
    equal "$(mailbox)" 1
}

# If TLS is temporarily not available, STARTTLS has the reply 454 and the session continues in the clear (RFC 3207, 4).
# not with: OVER_TLS
t_starttls_not_available() {
    echo 'void *SSL_new(void *context) { (void)context; return 0; }' | cc -shared -fPIC -o "$T/no_tls.so" -xc -
    authority
    LD_PRELOAD=$T/no_tls.so ASAN_OPTIONS=verify_asan_link_order=0 tls_provider
    dialogue_on_a_new_connection <<'END'
P: 220 *
C: EHLO x
P: ...
P: 250-STARTTLS
P: 250 ATRN
C: STARTTLS
P: 454 *
C: NOOP
P: 250 *
C: (closes)
END
    login
    ask ATRN '^453 '
    hang_up
    customer 75 --trace --ca "$T/ca.crt" "localhost:$PORT"
    hasnt "$T/err" 'C: AUTH'
}

# The customer discards octets received in the clear after the reply to STARTTLS (RFC 3207, 4.2).
# not with: OVER_TLS
t_customer_ignores_what_stands_behind_starttls() {
    tls_provider
    put_letter one 1.a a@example.edu eva@example.org
    REAL_PORT=$PORT INJECT_REPLY='250-AUTH CRAM-MD5\r\n250 ATRN\r\n' serve man_in_the_middle
    customer 0 --trace --ca "$T/ca.crt" "localhost:$PORT"
    has "$T/err" 'in the clear; it is discarded'
    has "$T/err" '^\[1\] C: AUTH SCRAM-SHA-256-PLUS'
    equal "$(mailbox)" 1
}

# With --require-tls, in the clear, AUTH has the reply 538 and ATRN 530 (RFC 3207, 4).
# not with: OVER_TLS
t_require_tls() {
    tls_provider --require-tls
    open_session
    match "$ANSWER" '\|250-AUTH '
    each_row ask_raw <<END
AUTH CRAM-MD5 | 538 | RFC 4954, 6: the mechanism needs encryption
AUTH SCRAM-SHA-256 $(b64 n,,n=example.org,r=a) | 538 | the same
ATRN          | 530 | RFC 2645, 5.2.1: not authenticated
END
    customer 1 --ca "$T/ca.crt" "localhost:$PORT"
}

# With SSLKEYLOGFILE both sides append the same TLS secrets to a file that only its owner can read, and write nothing
# through a link (RFC 8446, 7.1).
# not with: OVER_TLS
t_secrets_of_tls_for_wireshark() {
    local lines
    SSLKEYLOGFILE=$T/provider.keys tls_provider
    SSLKEYLOGFILE=$T/customer.keys customer 1 --ca "$T/ca.crt" "localhost:$PORT"
    has "$T/err" "SSLKEYLOGFILE $T/customer.keys: who reads it can read what TLS protects"
    has "$T/customer.keys" '^CLIENT_TRAFFIC_SECRET_0 [0-9a-f]\{64\} [0-9a-f]\{64,\}$'
    equal "$(grep -v '^#' "$T/customer.keys" | sort | comm -13 <(sort "$T/provider.keys") -)" ''
    equal "$(stat -c %a "$T/customer.keys" "$T/provider.keys" | xargs)" '600 600'

    lines=$(wc -l < "$T/customer.keys")
    SSLKEYLOGFILE=$T/customer.keys customer 1 --ca "$T/ca.crt" "localhost:$PORT"
    equal "$(wc -l < "$T/customer.keys")" $((2 * lines)) 'lines after a second session'

    ln -s "$T/elsewhere" "$T/link"
    SSLKEYLOGFILE=$T/link customer 1 --ca "$T/ca.crt" "localhost:$PORT"
    has "$T/err" "SSLKEYLOGFILE $T/link: Too many levels of symbolic links; no secrets are written"
    [ ! -e "$T/elsewhere" ] || fail 'it was written through a link'
}

# TLS's close alert follows the 421 after the third failure, so a client can tell the end from a lost connection
# (RFC 8446, 6.1; RFC 3207, 4).
# not with: OVER_TLS
t_421_ends_tls_properly() {
    local wrong
    wrong="AUTH PLAIN $(encoded '\0example.org\0wrong')"
    tls_provider
    s_client "EHLO x\n$wrong\n$wrong\n$wrong\n" -starttls smtp -state ||
        fail "exit $? of openssl: $(cat "$T/s_client.err")"
    equal "$(grep -c '^535 ' "$T/s_client") $(tail -n 1 "$T/s_client" | cut -c1-4)" '3 421 '
    has "$T/s_client.err" '^SSL3 alert read:warning:close notify'
    hasnt "$T/s_client.err" 'unexpected eof'
}

# Neither side accepts TLS below 1.2, whatever OpenSSL's configuration allows (RFC 8996, 4 and 5).
# not with: OVER_TLS
t_tls_versions() {
    printf '%s\n' 'openssl_conf = o' '[o]' 'ssl_conf = s' '[s]' 'system_default = d' '[d]' 'MinProtocol = TLSv1' \
        'CipherString = DEFAULT@SECLEVEL=0' > "$T/lax.cnf"
    export OPENSSL_CONF=$T/lax.cnf
    tls_provider
    handshake -starttls smtp -tls1_2 || fail 'TLS 1.2 was refused'
    ! handshake -starttls smtp -tls1_1 || fail 'TLS 1.1 was accepted'
    ! handshake -starttls smtp -tls1 || fail 'TLS 1.0 was accepted'
    old_server
    handshake -tls1_1 || fail 'there is no TLS 1.1 to refuse'
    customer 76 --timeout 5 --tls --ca "$T/ca.crt" "localhost:$PORT"
    has "$T/err" 'TLS handshake failed'
}
handshake() { timeout "$PATIENCE" openssl s_client -connect "127.0.0.1:$PORT" "$@" < /dev/null > "$T/s_client" 2>&1; }
# Starts a server that has no TLS newer than 1.1.
old_server() {
    openssl s_server -accept 127.0.0.1:0 -tls1_1 -cert "$T/server.pem" -key "$T/server.pem" -www > "$T/s_server" 2>&1 &
    STARTED+=($!)
    until_true shows "$T/s_server" ACCEPT
    PORT=$(sed -n 's/^ACCEPT .*:\([0-9]*\)$/\1/p' "$T/s_server")
}

# If TLS records without application data follow a message, neither side waits for more (RFC 8446, 4.6).
# not with: OVER_TLS
t_tls_records_without_data() {
    local start
    authority
    provider
    put_many 40
    put_letter last 99.b a@example.edu eva@example.org
    noise --cert "$T/server.pem" "$PORT"
    start=$SECONDS
    customer 0 --tls --ca "$T/ca.crt" --timeout 40 "127.0.0.1:$NOISE"
    [ $((SECONDS - start)) -lt 30 ] || fail 'it waited for what was not there'
    equal "$(mailbox)" 41
    put_many 3
    perl_server
    PORT=$NOISE relay 0 "$SERVER" --tls --ca "$T/ca.crt" --timeout 40
    has "$T/err" '3 messages, .* handed on'
    tls_provider
    put_many 40
    noise "$TLS_PORT"
    customer 0 "127.0.0.1:$NOISE"
    equal "$(mailbox)" 81
    equal "$(waiting)" 0
}

# Endless key updates before the log-in delay neither the end of the session nor the shutdown (RFC 8446, 4.6.3).
# not with: OVER_TLS
t_flood_of_key_updates() {
    local start
    tls_provider --login-timeout 2
    noise --flood "$TLS_PORT"
    dial "$NOISE"
    until_true shows "$LOG" 'disconnected'
    hang_up
    tls_provider --login-timeout 60
    noise --flood "$TLS_PORT"
    dial "$NOISE"
    until_true shows "$LOG" 'connected'; moment 0.5
    start=$SECONDS
    stop_provider
    [ $((SECONDS - start)) -lt 40 ] || fail 'the shutdown waited for the end of the log-in time'
}

# A handshake that stops delays no other session and ends at the log-in time-out (RFC 3207, 4).
# not with: OVER_TLS
t_slow_handshakes() {
    local i
    tls_provider --login-timeout 3
    for i in {1..10}; do dial "$TLS_PORT"; done
    open_session; ask STARTTLS '^220'; printf '\x16\x03\x01\x01\x00' >&"$LINE"
    customer 1 --ca "$T/ca.crt" "localhost:$PORT"
    dial "$TLS_PORT"; say 'EHLO x'
    until_true shows "$LOG" 'TLS handshake failed'
    until_true counted 11 'kept us waiting' "$LOG"
    customer 1 --tls --ca "$T/ca.crt" "localhost:$TLS_PORT"
}

# The customer sends no credentials to a server whose certificate is unknown, self-signed, expired or for another name
# (RFC 3207, 4.1).
# not with: OVER_TLS
t_certificates_that_do_not_verify() {
    authority
    certificate other_ca '/CN=Another CA'
    certificate unknown /CN=localhost DNS:localhost other_ca
    certificate self /CN=localhost DNS:localhost
    certificate wrong /CN=localhost DNS:elsewhere.example ca
    needs faketime
    # shellcheck disable=SC2016
    faketime '3 months ago' bash -c 'openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 \
        -subj /CN=localhost -addext subjectAltName=DNS:localhost -CA "$1/ca.crt" -CAkey "$1/ca.pem" \
        -keyout "$1/expired.pem" -out "$1/expired.crt"' - "$T" 2> /dev/null
    cat "$T/expired.crt" >> "$T/expired.pem"
    refuses_certificate unknown 'unable to get local issuer certificate\|unable to verify'
    refuses_certificate self 'self.signed'
    refuses_certificate wrong 'hostname mismatch'
    refuses_certificate expired 'expired'
    tls_provider --cert "$T/server.pem"
    customer 1 --trace --ca "$T/ca.crt" "127.0.0.1:$PORT"
    customer 1 --trace --ca "$T/ca.crt" --tls "localhost:$TLS_PORT"
    hasnt "$T/err" STARTTLS
    customer 77 --trace "localhost:$PORT" # our authority is not one of the system's
    customer 64 --ca "$T/ca.crt" --insecure "localhost:$PORT"
    customer 78 --ca "$T/nothing" "localhost:$PORT"
}
refuses_certificate() {
    local host=${3:-localhost}
    tls_provider --cert "$T/$1.pem"
    customer 77 --trace --ca "$T/ca.crt" "$host:$PORT"
    has "$T/err" "$2"
    hasnt "$T/err" 'C: \(AUTH\|ATRN\)'
    customer 77 --trace --ca "$T/ca.crt" --tls "$host:$TLS_PORT"
    customer 1 --trace --insecure "$host:$PORT"
    customer 77 --trace --insecure --mechanism PLAIN "$host:$PORT"
    hasnt "$T/err" 'C: AUTH'
    stop_provider
}

# The customer refuses a certificate for another address or purpose, or with an issuer that is not an authority (RFC
# 5280, 6.1; RFC 9525, 6).
# not with: OVER_TLS
t_certificates_for_something_else() {
    authority
    certificate address /CN=127.0.0.1 IP:127.0.0.2 ca
    certificate names /CN=127.0.0.1 DNS:localhost,DNS:127.0.0.1 ca
    certificate client /CN=localhost DNS:localhost ca clientAuth
    certificate leaf /CN=elsewhere.example DNS:elsewhere.example ca
    certificate by_leaf /CN=localhost DNS:localhost leaf
    cat "$T/leaf.crt" >> "$T/by_leaf.pem"
    certificate nul /CN=localhost "$(name_with_nul localhost)" ca
    refuses_certificate address 'IP address mismatch' 127.0.0.1
    refuses_certificate names 'IP address mismatch' 127.0.0.1
    refuses_certificate client 'unsuitable certificate purpose'
    refuses_certificate by_leaf 'invalid CA certificate'
    refuses_certificate nul 'hostname mismatch'
}

# --ca replaces the system's authorities and does not supplement them (RFC 5280, 6.1).
# not with: OVER_TLS
t_ca_replaces_the_system_s() {
    tls_provider
    certificate other_ca '/CN=Another CA'
    SSL_CERT_FILE=$T/ca.crt customer 1 "localhost:$PORT"
    SSL_CERT_FILE=$T/ca.crt customer 77 --trace --ca "$T/other_ca.crt" "localhost:$PORT"
    hasnt "$T/err" 'C: AUTH'
}

# After SIGHUP the next session uses the new certificates, or the old ones if the new cannot be read (RFC 3207, 4).
# not with: OVER_TLS
t_sighup_reads_certificates_again() {
    authority
    cp "$T/server.pem" "$T/live.pem"
    provider --cert "$T/live.pem"
    certificate_shown; equal "$SHOWN" 'subject=CN=example.net'
    certificate next /CN=next.example.net DNS:localhost ca
    cp "$T/next.pem" "$T/live.pem"
    kill -HUP "$PROVIDER"; until_true shows "$LOG" 'certificates too'
    certificate_shown; equal "$SHOWN" 'subject=CN=next.example.net'
    echo nonsense > "$T/live.pem"
    kill -HUP "$PROVIDER"; until_true shows "$LOG" 'reload failed: .*stay in use'
    certificate_shown; equal "$SHOWN" 'subject=CN=next.example.net'
    stop_provider
    run 78 "$ODMR" provider -l 127.0.0.1:0 -q "$T/queue" -a "$T/accounts" --cert "$T/live.pem"
    run 78 "$ODMR" provider -l 127.0.0.1:0 -q "$T/queue" -a "$T/accounts" --cert "$T/server.pem" --key "$T/ca.pem"
    run 78 "$ODMR" provider -l 127.0.0.1:0 -q "$T/queue" -a "$T/accounts" --cert "$T/server.pem" \
        --client-ca "$T/live.pem"
    run 64 "$ODMR" provider --tls-listen 127.0.0.1:0 -q "$T/queue" -a "$T/accounts"
    run 64 "$ODMR" provider --require-tls -q "$T/queue" -a "$T/accounts"
}
certificate_shown() {
    SHOWN=$(echo QUIT | timeout "$PATIENCE" openssl s_client -starttls smtp -connect "127.0.0.1:$PORT" 2> /dev/null |
        openssl x509 -noout -subject | tr -d ' ')
}

# An encrypted key is refused without asking for a pass phrase, at the start and at SIGHUP (RFC 5958, 3).
# not with: OVER_TLS
t_encrypted_key() {
    needs unbuffer # its package has expect(1); "expect" is our function here
    authority
    openssl pkey -in "$T/server.pem" -aes256 -passout pass:phrase -out "$T/encrypted.key"
    mkdir "$T/queue"; accounts
    env expect > "$T/tty" 2>&1 <<END || fail "exit $?: $(cat "$T/tty")"
set timeout $PATIENCE
set key $T/encrypted.key
set provider [spawn $ODMR provider -l 127.0.0.1:0 -q $T/queue -a $T/accounts --cert $T/server.crt --key \$key]
expect timeout { exec kill -9 \$provider; exit 1 } eof
lassign [wait] pid id failed code
exit [expr {\$failed || \$code != 78}]
END
    has "$T/tty" 'encrypted.key: '
    hasnt "$T/tty" 'pass phrase'
    cp "$T/server.pem" "$T/live.key"
    provider --cert "$T/server.crt" --key "$T/live.key"
    cp "$T/encrypted.key" "$T/live.key"
    kill -HUP "$PROVIDER"; until_true shows "$LOG" 'reload failed: .*stay in use'
    certificate_shown; equal "$SHOWN" 'subject=CN=example.net'
}

# An error in a file for TLS is reported with the option and the file, on both sides (RFC 7468, 2).
t_words_for_files_of_tls() {
    authority; mkdir "$T/queue"; accounts
    words() { # CODE WORDS OPTION...
        local code=$1 words=$2; shift 2
        if [ "$code" = 78 ] && [ "$1" != customer ]; then
            set -- provider -l 127.0.0.1:0 -q "$T/queue" -a "$T/accounts" "$@"
        fi
        ODMR_SECRET=x run "$code" "$ODMR" "$@"
        has "$T/err" "odmr: .*$words\$"
        hasnt "$T/err" ' lib'
    }
    cd "$T" || fail
    openssl x509 -in server.crt -outform DER -out der.crt
    openssl pkey -in server.pem -out server.key
    openssl ecparam -name prime256v1 -genkey -noout -out other.key
    openssl pkey -in server.key -aes256 -passout pass:phrase -out locked.key
    : > empty
    words 78 '--cert nosuch: no such file' --cert nosuch
    words 78 '--key nosuch: no such file' --cert server.crt --key nosuch
    words 78 '--cert der.crt: not PEM' --cert der.crt --key server.key
    words 78 '--cert empty: not PEM' --cert empty
    words 78 '--cert server.crt: no private key in it' --cert server.crt
    words 78 '--key ./server.crt: no private key in it' --cert server.crt --key ./server.crt
    words 78 '--cert server.key: no certificate in it' --cert server.key
    words 78 '--key locked.key: the private key is encrypted' --cert server.crt --key locked.key
    words 78 '--key other.key: key values mismatch' --cert server.crt --key other.key
    { echo 'a CERTIFICATE is not in this file'; cat server.key; } > text.key
    words 78 '--cert text.key: no certificate in it' --cert text.key
    words 78 '--cert queue: Is a directory' --cert queue
    words 78 '--client-ca nosuch: no such file' --cert server.pem --client-ca nosuch
    words 78 '--client-ca server.key: no certificate in it' --cert server.pem --client-ca server.key
    words 78 '--ca nosuch: no such file' customer -u x --ca nosuch 127.0.0.1:1
    words 78 '--cert server.crt: no private key in it' customer -u x --cert server.crt 127.0.0.1:1
}

# ---- RFC 2920: PIPELINING ----------------------------------------------------------------------------

# If a server refuses every command that arrives before its reply to the end of a message, it still gets each message
# once, in one session (RFC 2920, 3.2).
t_2920_a_server_that_refuses_what_follows_the_final_dot() {
    local i offer
    provider
    for offer in PIPELINING 'PIPELINING CHUNKING'; do
        for i in {1..6}; do put_letter "$i" "$i.a" a@example.edu eva@example.org bob@example.org; done
        login; ask ATRN '^250 '
        receiver 'my $in = ""; greets(split / /, shift);
            sub more { my $r = ""; vec($r, 0, 1) = 1; select $r, undef, undef, 0.4 or return 0;
                sysread STDIN, $in, 65536, length $in or exit }
            sub command { while (1) { return $1 if $in =~ s/\A(.*?)\r\n//s; more() } }
            sub octets { while (length $in < $_[0]) { more() } substr $in, 0, $_[0], "" }
            sub early { while (more()) { } my $n = 0;
                while ($in =~ s/\A(.*?)\r\n//s) { $n++; octets($1) if $1 =~ /^BDAT (\d+)/ } $n }
            while (1) {
                my ($l, $text) = command();
                if ($l eq "QUIT") { said(221); exit }
                if ($l eq "DATA") { said(354); my $d; $text .= "$d\n" while ($d = command()) ne "." }
                if ($l =~ /^BDAT (\d+)/) { $text = octets($1) }
                if ($text) { my $early = early(); $text =~ /^Subject: (\w+)/m; print STDERR "$1 "; said("250 taken");
                    said("503 5.5.1 too early") for 1 .. $early; next }
                said("250 ok");
            }' "$offer" 2> "$T/taken"
        hang_up
        until_true settled
        equal "$(tr ' ' '\n' < "$T/taken" | sort | xargs) / $(waiting) $(notices)" '1 2 3 4 5 6 / 0 0' "$offer"
        equal "$(grep -c "the customer's server answered 503 to a pipelined MAIL" "$LOG")" 1 \
            "$offer"
        : > "$LOG"
    done
}

# If a customer's replies are longer than the 512 octets that the provider reserves for each, the provider waits after
# each command, so two blocking peers never wait for each other (RFC 2920, 3.2; RFC 5321, 4.5.3.1.5).
# not with: OVER_TLS
t_2920_a_customer_with_long_replies() {
    local i
    provider
    perl -e 'print "Subject: large\n\n"; print "x" x 70, "\n" for 1 .. 3000' > "$T/large"
    for i in {1..80}; do put "$i.a" a@example.edu eva@example.org < "$T/large"; done
    login; ask ATRN '^250 '
    receiver 'greets(qw(PIPELINING CHUNKING)); my ($taken, $long) = (0, "250-" . "so it is " x 200 . "\r\n");
        while ((my $l = heard()) ne "QUIT") {
            if ($l =~ /^BDAT (\d+)/) { content($1); $taken++ }
            print $long x 60; said("250 ok") }
        said(221); print STDERR $taken' 2> "$T/taken" || fail 'the session stands still'
    hang_up
    until_true settled
    equal "$(< "$T/taken") $(waiting)" '80 0'
}

# With PIPELINING no more replies are outstanding than fit the receive buffer of the size that the kernel gave it
# (RFC 2920, 3.1).
t_2920_no_more_replies_than_the_buffer_holds() {
    local wanted
    for wanted in 320 98; do
        [ "$wanted" = 320 ] || variant '/SO_RCVBUF, &(int){RECEIVE_BUFFER}/s/RECEIVE_BUFFER/65536/'
        provider
        put_many 200
        login; ask ATRN '^250 '
        receiver 'greets(qw(PIPELINING CHUNKING)); my ($in, $n) = ("", 0);
            while (1) { # until the number expected, and one second longer
                $n = () = $in =~ /^(?:MAIL|RCPT|BDAT) /gm;
                my $r = ""; vec($r, 0, 1) = 1; select $r, undef, undef, $n < $ARGV[0] ? 10 : 1 or last;
                sysread STDIN, $in, 65536, length $in or last;
            }
            print STDERR $n' "$wanted" 2> "$T/outstanding"
        hang_up
        until_true settled
        equal "$(< "$T/outstanding")" "$wanted"
    done
}

# If all recipients are refused after DATA or BDAT was sent, no content is delivered and the next message is not
# affected (RFC 2920, 3.1).
t_pipelining_when_nobody_is_accepted() {
    provider
    ANSWERS['RCPT TO:<eva@example.org>']='450 4.2.0 later'
    for OFFER in PIPELINING 'PIPELINING CHUNKING'; do
        put_letter one 1.a a@example.edu eva@example.org
        turn
        [ "$OFFER" != PIPELINING ] || equal "$(cat "$T/content")" ''
        until_true claimable "$T/queue/example.org/new/1.a"
        put_letter two 2.a a@example.edu bob@example.org
        turn
        equal "$N_GOT $(ls "$T/queue/example.org/new")" '1 1.a' "$OFFER"
        has "$T/got/1" 'Text of two'
        until_true claimable "$T/queue/example.org/new/1.a"
    done
}

# If replies arrive before their commands, only a message that was sent leaves the queue (RFC 2920, 3.1).
t_replies_before_their_commands() {
    provider
    put_letter one 1.a a@example.edu eva@example.org
    login
    dialogue <<'END'
C: ATRN
C: 220 a
C: 250 a
C: 250 ok
C: 250 ok
C: 354 go on
C: 250 ok
C: nonsense
END
    timeout "$PATIENCE" cat <&"$LINE" > "$T/line"
    until_true settled
    [ "$(waiting)" = 1 ] || has "$T/line" '^Text of one'
}

# 100 messages need fewer than 12 waits with CHUNKING, and about one each with PIPELINING (RFC 2920, 1; RFC 3030, 4.2).
# A wait is counted when the provider has sent something and must then wait for the customer.
t_round_trips() {
    local waits
    provider
    for OFFER in 'PIPELINING CHUNKING' PIPELINING; do
        put_many 100
        turn
        equal "$N_GOT" 100
        waits=$(sed -n 's/.*refused; \([0-9]*\) waits*.*/\1/p' "$LOG" | tail -n 1)
        if [ "$OFFER" = PIPELINING ]; then [ "$waits" -le 110 ] || fail "$waits waits with PIPELINING"; fi
    done
    put_many 100
    customer 0 "127.0.0.1:$PORT"
    until_true counted 3 '100 messages.* waits?' "$LOG"
    waits=$(sed -n 's/.*refused; \([0-9]*\) waits*.*/\1/p' "$LOG" | tail -n 1)
    [ "$waits" -lt 12 ] || fail "$waits waits with CHUNKING"
}

# ---- RFC 3030: CHUNKING ------------------------------------------------------------------------------

# If a server behind a proxy does not know BDAT, no message leaves the queue and no QUIT is sent (RFC 3030, 2). The
# server reads the content as commands, so lines like NOOP in the content cause replies of 250.
t_3030_a_server_that_does_not_know_bdat() {
    local i code
    provider
    for code in 500 502 504; do
        for i in {1..8}; do
            { letter "$i"; printf 'NOOP\nRSET\nNOOP\n'; } | put "$i.a" a@example.edu eva@example.org
        done
        at_ATRN 'PIPELINING CHUNKING 8BITMIME'
        while hear; do
            case $HEARD in
            MAIL* | RCPT* | NOOP | RSET) say '250 ok' ;;
            QUIT) fail 'QUIT, though nothing that was said is believed' ;;
            *) say "$code unrecognized command" ;;
            esac
        done 2> /dev/null
        hang_up
        until_true settled
        equal "$(waiting) $(notices)" '8 0' "$code"
        has "$LOG" \
            "the reversed session ended early: the customer's server does not know BDAT, though CHUNKING was offered"
    done
}

# With CHUNKING but without PIPELINING the provider uses DATA, because BDAT would save nothing (RFC 3030, 4.2).
t_chunking_needs_pipelining() {
    provider
    put_letter one 1.a a@example.edu eva@example.org
    OFFER=CHUNKING
    turn
    equal "$N_GOT" 1
    has "$T/heard" '^DATA$'
    hasnt "$T/heard" '^BDAT'
}

# ---- RFC 1870: SIZE ----------------------------------------------------------------------------------

# If a message is too large for the customer, or has 8-bit content or UTF-8 addresses that the customer does not take,
# it is returned unsent (RFC 1870, 5; RFC 6152, 3; RFC 6531, 3.2).
t_what_the_customer_cannot_take() {
    provider
    { letter one; head -c 2000 /dev/zero | tr '\0' x; } | put 1.a sender@example.edu eva@example.org
    OFFER='SIZE SIZE=2000'; turn
    has "$T/notice.1" '^Status: 5.3.4$'
    has "$T/notice.1" '^Diagnostic-Code: x-odmr; 5.3.4 The message has [0-9]* octets'
    hasnt "$T/notice.1" Remote-MTA
    printf 'Subject: x\n\n\xc3\xa9\n' | put 1.a sender@example.edu eva@example.org
    OFFER='SIZE=0 SMTPUTF8'; turn
    has "$T/notice.2" '^Status: 5.6.3$'
    OFFER=8BITMIME
    # with an address in UTF-8, only that recipient is returned
    put_letter one 1.a sender@example.edu $'\xc3\xa9va@example.org' bob@example.org
    rm -r "$T/got"; turn
    equal "$N_GOT" 1
    equal "$(grep -h '^RCPT' "$T/got"/*)" 'RCPT TO:<bob@example.org>'
    has "$T/notice.3" $'^Final-Recipient: utf-8; \xc3\xa9va@example.org'
    has "$T/notice.3" '^Status: 5.6.7$'
    has "$T/notice.3" '^Content-Type: message/global-delivery-status'
    put_letter one 1.a $'\xc3\xa9va@example.edu' bob@example.org
    turn
    equal "$(notices)" 4
    equal "$(waiting)" 0
}

# ---- RFC 6152: 8BITMIME ------------------------------------------------------------------------------

# MAIL has SIZE, BODY=8BITMIME and SMTPUTF8 if the message needs them and the customer offers them (RFC 6152, 2;
# RFC 1870, 5; RFC 6531, 3.4).
t_what_the_customer_can_take_is_declared() {
    provider
    OFFER='SIZE=100000 8BITMIME SMTPUTF8'
    printf 'Subject: x\n\nabc\n' | put 1.a sender@example.edu eva@example.org
    printf 'Subject: x\n\n\xc3\xa9\n' | put 2.a sender@example.edu eva@example.org
    printf 'Subject: \xc3\xa9\n\nx\n' | put 3.a sender@example.edu eva@example.org
    printf 'Subject: x\n\nx\n' | put 4.a sender@example.edu $'\xc3\xa9va@example.org'
    turn
    equal "$(grep -h '^MAIL' "$T"/got/* | sort)" 'MAIL FROM:<sender@example.edu> SIZE=17 SMTPUTF8
MAIL FROM:<sender@example.edu> SIZE=18 BODY=8BITMIME
MAIL FROM:<sender@example.edu> SIZE=18 BODY=8BITMIME SMTPUTF8
MAIL FROM:<sender@example.edu> SIZE=19'
    OFFER=''
    put_letter one 1.a sender@example.edu eva@example.org
    rm -r "$T/got"; turn
    equal "$(grep -h '^MAIL' "$T"/got/*)" 'MAIL FROM:<sender@example.edu>'
}

# ---- RFC 6531: SMTPUTF8 ------------------------------------------------------------------------------

# A header with 8-bit octets and ASCII addresses is sent unchanged with 8BITMIME; SMTPUTF8 is declared if it is
# offered and the header is UTF-8 (RFC 6531, 3.4).
t_6531_a_header_with_8_bit_octets() {
    provider
    printf 'Subject: \xc3\xa9\n\nx\n' | put 1700000001.utf8 sender@example.edu eva@example.org
    printf 'Subject: \xe9\n\nx\n' | put 1700000002.latin1 sender@example.edu eva@example.org
    { printf 'Subject: \xc3\xa9'; printf '%01100d\n\nx\n' 1; } | put 1700000003.long sender@example.edu eva@example.org
    cp -r "$T/queue" "$T/before"
    OFFER=8BITMIME turn
    equal "$(grep -h '^MAIL' "$T"/got/* | sort | uniq -c | xargs)" '3 MAIL FROM:<sender@example.edu> BODY=8BITMIME'
    equal "$(sed -n '/^\r*$/,$p' "$T/got/2" | sed 1d | head -n 1)" $'Subject: \xe9\r'
    cp -r "$T/before/." "$T/queue"
    OFFER='8BITMIME SMTPUTF8' turn
    equal "$(grep -h '^MAIL' "$T"/got/{1,2,3} | sed 's/.*BODY=8BITMIME//' | tr '\n' '|')" ' SMTPUTF8|||'
    equal "$(waiting) $(notices)" '0 0'
}

# ---- RFC 3461 to 3464: failure notices ---------------------------------------------------------------

# A notice contains only printable text, whatever the message and the replies contained (RFC 3464, 2.1; RFC 5322,
# 2.1.1).
t_3464_what_a_notice_shows() {
    provider
    {
        printf 'Subject: \xe9 \x1b[31m\0 x\nX-Long: '; printf '%02000d' 1; printf '\nX-Last: yes\n\nbody\n'
    } | put 1.a s@example.edu eva@example.org bob@example.org zoe@example.org
    OFFER=8BITMIME
    ANSWERS=(['RCPT TO:<eva@example.org>']='550 5.-1.+2 no'
        ['RCPT TO:<bob@example.org>']=$'550-5.1.1 nobody\r\n550 5.1.1 here' ['RCPT TO:<zoe@example.org>']='550 5.2.3')
    turn
    until_true settled
    equal "$(sed -n 's/^Status: //p' "$T/notice.1" | xargs)" '5.0.0 5.1.1 5.2.3'
    has "$T/notice.1" '^Diagnostic-Code: smtp; 550 5.1.1 nobody / 5.1.1 here$'
    has "$T/notice.1" '^Content-Type: text/rfc822-headers$'
    has "$T/notice.1" '^Subject: ? ?\[31m$'
    has "$T/notice.1" '^X-Last: yes$'
    ! LC_ALL=C grep -q $'[^ -~\t]' "$T/notice.1" || fail 'an octet that is no text'
    ! grep -q '.\{999\}' "$T/notice.1" || fail 'a line over 998 octets'
}

# If sendmail does not accept a notice, the refused message stays queued until it does (RFC 5321, 6.1; RFC 3464, 1).
t_notice_that_is_not_accepted() {
    sed /exec/d "$SCRATCH/sendmail" > "$T/sendmail"; chmod 755 "$T/sendmail"
    provider
    put_letter one 1.a sender@example.edu eva@example.org bob@example.org
    ANSWERS['RCPT TO:<eva@example.org>']='550 5.1.1 no'
    echo 75 > "$T/sendmail.exit"
    turn
    has "$LOG" '^.* failure notice for .* not accepted: .*; message kept$'
    equal "$(sed -n 's/^Delivered-To: //p' "$T/queue/example.org/new/1.a" | xargs)" 'eva@example.org bob=example.org'
    chmod 000 "$T/sendmail"
    turn
    has "$LOG" 'failure notice for .* not sent: --sendmail .*; message kept$'
    equal "$(waiting)" 1
    chmod 755 "$T/sendmail"; rm "$T/sendmail.exit"
    turn
    equal "$(waiting) $(notices)" '0 1'
}

# If a message with the null sender is refused, no notice is sent, and it is set aside for its refused recipients
# (RFC 5321, 4.5.5; RFC 3464, 2).
t_refused_mail_from_the_null_sender() {
    local folder=$T/queue/example.org/.Undeliverable
    provider
    put_letter one 1.a '' eva@example.org bob@example.org zoe@example.org
    ANSWERS['RCPT TO:<eva@example.org>']='550 5.1.1 no'
    ANSWERS['RCPT TO:<bob@example.org>']='450 later'
    turn
    equal "$(notices)" 0
    equal "$(cat "$folder/new"/*)" "$(printf 'Return-Path: <>\nDelivered-To: eva@example.org\n'; letter one)"
    equal "$(cat "$T/queue/example.org/new/1.a")" "$(echo 'Return-Path: <>'
        printf 'Delivered-To: %s\n' eva=example.org bob@example.org zoe=example.org; letter one)"
    [ -e "$folder/maildirfolder" ] || fail 'not a Maildir++ folder'
    run 0 "$ODMR" queue -q "$T/queue" -l
    has "$T/out" '^example.org/.Undeliverable  *1 '
    has "$T/out" 'to <eva@example.org>'
    ANSWERS=(); turn
    equal "$(find "$T/queue/example.org/new" -type f | wc -l)" 0
    login; ask ATRN '^453 ' # a message that is set aside is never sent
}

# If sendmail hangs, a session waits for it once, and the other refused messages stay queued without another wait
# (RFC 5321, 6.1).
t_a_sendmail_that_hangs() {
    local start
    variant 's/^#define NOTICE_TIMEOUT 60 /#define NOTICE_TIMEOUT 2 /'
    printf '#!/bin/sh\nsleep 60\n' > "$T/sendmail"; chmod 755 "$T/sendmail"
    provider
    put_many 6 r%d@example.org
    ANSWERS=([RCPT]='550 no' ['RCPT TO:<r1@example.org>']='250 ok')
    start=$SECONDS
    turn
    until_true settled
    [ $((SECONDS - start)) -lt 50 ] || fail 'it waited for the end of the program'
    equal "$(waiting)" 5
    equal "$(grep -c 'failure notice for .* not accepted: .*/sendmail did not end by itself; message kept$' "$LOG")" 1
    equal "$(grep -c 'failure notice for .* not sent in this session; message kept' "$LOG")" 4
}

# ---- RFC 9422: LIMITS --------------------------------------------------------------------------------

# A transaction has no more recipients, and a session no more transactions, than LIMITS allows (RFC 9422, 4).
t_9422_limits() {
    provider
    put_letter one 1.a a@example.edu r{1..5}@example.org
    OFFER='LIMITS=RCPTMAX=2 PIPELINING' turn
    equal "$N_GOT $(grep -hc '^RCPT' "$T"/got/* | xargs)" '3 2 2 1'
    put_many 5
    rm -r "$T/got"
    OFFER='LIMITS=MAILMAX=3,RCPTMAX=x PIPELINING CHUNKING' turn
    until_true settled
    equal "$N_GOT $(waiting)" '5 0' 'a limit that cannot be read'
    put_many 5
    rm -r "$T/got"
    OFFER='LIMITS=RCPTMAX=1000 LIMITS=MAILMAX=3 PIPELINING CHUNKING' turn
    until_true settled
    equal "$N_GOT $(waiting) $(tail -n 1 "$T/heard")" '3 2 QUIT'
    has "$LOG" 'the customer takes no more than 3 transactions a session (RFC 9422); the rest of the mail stays queued'
}

# ---- Maildir -----------------------------------------------------------------------------------------

# Messages are sent in the order of arrival, across domains.
t_order_of_arrival() {
    local i
    provider
    for i in 5 3 10 1 9; do put_letter "$i" "$((1700000000 + i)).M1P1.host" a@example.edu eva@example.org; done
    for i in 4 2; do put_letter "$i" "$((1700000000 + i)).M1P1.host" a@example.edu bob@example.com; done
    for i in 9 10; do put_letter "u$i" "1700000020.V801I9M$((i + 100)).host" a@example.edu bob@example.com; done
    turn
    equal "$(for i in $(seq "$N_GOT"); do sed -n 's/^Text of //p' "$T/got/$i"; done | tr -d '\r\n')" \
        '1.2.3.4.5.9.10.u9.u10.'
    # the microseconds are the digits directly after an M or H
    put_letter later 1700000030.Mx1M10.host a@example.edu eva@example.org
    put_letter sooner 1700000030.Mx9M2.host a@example.edu eva@example.org
    rm -r "$T/got"; turn
    equal "$(sed -n 's/^Subject: //p' "$T/got/1" | tr -d '\r')" sooner
}

# The provider reads the envelope fields of other mail servers, too; fields below them belong to earlier hops.
t_envelopes_of_other_writers() {
    local box
    provider
    box=$T/queue/example.org/new
    mkdir -p "$box" "$T/queue/example.org/cur"
    printf '%s\n' 'delivery-date: now' 'ENVELOPE-TO: eva@example.org,' $'\t<bob@example.org>' \
        'return-path: <x@example.edu>' 'Subject: Exim' '' t > "$box/1.a"
    printf '%s\r\n' 'X-Original-To: old@example.edu' 'Delivered-To: <Eva@Example.ORG>' 'Return-Path: <>' \
        'X: CRLF' '' t > "$T/queue/example.org/cur/2.b:2,S"
    printf 'X-Original-To: eva@example.org\nReceived: here\nDelivered-To: y@example.edu\n\nt\n' > "$box/3.c"
    turn
    equal "$N_GOT" 3
    equal "$(sed '/^$/q' "$T/got/1" | tr '\n' ' ')" \
        'MAIL FROM:<x@example.edu> RCPT TO:<eva@example.org> RCPT TO:<bob@example.org>  '
    equal "$(sed '/^$/q' "$T/got/2" | tr '\n' ' ')" 'MAIL FROM:<> RCPT TO:<Eva@Example.ORG>  '
    equal "$(sed '1,/^$/d' "$T/got/3" | tr '\r\n' ' /')" 'Received: here /Delivered-To: y@example.edu / /t /'
}

# The envelope ends before a second Return-Path, because that belongs to an earlier hop.
t_the_envelope_ends_before_a_second_return_path() {
    local box=$T/queue/example.org/new
    mkdir -p "$box"
    printf '%s\n' 'Return-Path: <last@example.edu>' 'Delivered-To: eva@example.org' \
        'Return-Path: <first@example.edu>' 'Delivered-To: mallory@example.org' 'Subject: x' '' x > "$box/1.a"
    provider
    turn
    tr -d '\r' < "$T/got/1" | same - <(printf '%s\n' 'MAIL FROM:<last@example.edu>' 'RCPT TO:<eva@example.org>' '' \
        'Return-Path: <first@example.edu>' 'Delivered-To: mallory@example.org' 'Subject: x' '' x)
}

# Two hosts with the same name, process number and clock give their files different names.
t_file_names_are_random() {
    needs faketime
    needs_namespaces -pf 'a process number that is there twice'
    local n
    mkdir "$T/queue"
    for n in 1 2; do
        letter $n |
            ASAN_OPTIONS=verify_asan_link_order=0 unshare -p -f faketime -f '2026-01-01 00:00:00' "$ODMR" enqueue \
            -q "$T/queue" eva@example.org || fail "exit $?"
    done
    equal "$(waiting)" 2 "files with the same clock and process: $(ls "$T/queue/example.org/new")"
    equal "$(ls "$T/queue/example.org/new" | cut -d R -f 1 | sort -u | wc -l)" 1 \
        'names that differ in their random part only'
    equal "$(ls "$T/queue/example.org/new" | grep -cE '^[0-9]+\.M[0-9]{6}P[0-9]+Q[0-9]+R[0-9a-f]{16}\..')" 2
}

# A directory with a name in upper case, or a symbolic link out of the queue, is not served, and odmr queue shows why.
t_directories_that_are_not_ours() {
    put_letter one 1.a a@example.edu eva@Example.ORG
    mkdir -p "$T/queue/example.com" "$T/elsewhere/new"
    letter two > "$T/elsewhere/new/1.a"
    ln -s "$T/elsewhere/new" "$T/queue/example.com/new"
    provider
    login; ask 'ATRN example.org' '^453 '; ask 'ATRN example.com' '^451 '
    has "$LOG" 'cannot read the queue of example.com: '
    run 75 "$ODMR" queue -q "$T/queue" -l
    has "$T/out" '^Example.ORG  *0  .* 1$'
    has "$T/out" '^      held: its directory is not in lower case'
}

# If a message changes while it is sent, it is not completed, stays in the queue, and no added octet is sent. A shorter
# message, or one with a new CR, would be another message, and added octets after BDAT would be commands.
t_message_that_somebody_writes_into() {
    local size change file=$T/queue/example.org/new/1.a
    provider
    for OFFER in '' 'PIPELINING CHUNKING'; do
        for size in 10 20000; do
            for change in 'yes more | head -n 40000 >> "$file"' \
                'printf "\r" | dd bs=1 seek=90 conv=notrunc of="$file"' \
                'truncate -s 90 "$file"'; do
                until_true settled
                perl -e 'print "Subject: x\n\n", "some line\n" x $ARGV[0]' "$size" |
                    put 1.a a@example.edu eva@example.org
                touch -d '1 hour ago' "$file"
                login
                ask ATRN '^250 '
                eval "$change" 2> "$T/err"
                say '220 example.org'; expect_line '^EHLO '
                offer_extensions
                printf '%s\r\n' '250 OK' '250 OK' '354 go on' >&"$LINE"
                timeout "$PATIENCE" cat <&"$LINE" > "$T/line"
                hang_up
                perl -0777 -ne '/^DATA\r\n.*^\.\r\n/ms || /^BDAT (\d+) LAST\r\n(.*)/ms && length $2 >= $1 || /more/
                    and die "a whole message\n"' \
                    "$T/line" 2> "$T/err" || fail "$OFFER: $size lines, $change: $(cat "$T/err")"
                equal "$(waiting)" 1 "$OFFER: $size lines, $change"
            done
        done
    done
    equal "$(grep -c 'a queued file became unreadable or was changed while it was sent; what is not' "$LOG")" 12
}

# If a message is still being written, in new instead of tmp, it is not sent until it is whole.
t_message_that_is_still_being_written() {
    local i file=$T/queue/example.org/new/1.a
    provider
    perl -e 'print "Subject: x\n\n", "some line\n" x 1000000' | put 1.a a@example.edu eva@example.org
    timeout "$PATIENCE" perl -e 'open my $f, ">>", $ARGV[0] or die; syswrite $f, "more\n" while -e $ARGV[1]' "$file" \
        "$T/accounts" &
    STARTED+=($!)
    for i in {1..50}; do
        login
        say ATRN
        expect '^(250|451) '
        hang_up
        until_true settled
        [[ $ANSWER != 451* ]] || break
    done
    kill "${STARTED[-1]}"
    match "$ANSWER" '^451 ' 'to a message that grows'
    has "$LOG" 'example.org/new/1.a skipped: it cannot be read to its end (Device or resource busy); it stays queued$'
}

# The customer removes old files from the tmp of its own Maildirs and from no other directory.
t_customer_leaves_alone_what_is_not_its_own() {
    provider
    mkdir -p "$T/mail/my.project/tmp" "$T/mail/example.org"/{new,cur,tmp}
    touch -d '3 days ago' "$T/mail/my.project/tmp/data" "$T/mail/example.org/tmp/1.a"
    put_letter one 1.a a@example.edu eva@example.org
    customer 0 "127.0.0.1:$PORT"
    [ -e "$T/mail/my.project/tmp/data" ] || fail 'somebody else'"'"'s file is gone'
    equal "$(ls "$T/mail/example.org/tmp")" ''
}

# ---- The program: options ----------------------------------------------------------------------------

ONE_MORE='MAIL FROM:<a@b.example>\r\nRCPT TO:<x@example.org>\r\nBDAT 6 LAST\r\nn: 1\r\n'

# at_80 FILE: checks that FILE is plain ASCII within 79 columns. Lines with a file name may be longer, because the name
# has the host's name in it.
at_80() {
    ! LC_ALL=C grep -n '[^ -~]' "$1" >&2 || fail "$1 is not plain ASCII"
    ! grep -vE '/new/[0-9]+\.M' "$1" | grep -nE '.{80}' >&2 || fail "$1 is too wide"
}

# Wrong usage ends with exit code 64 and one line of explanation.
t_wrong_usage() {
    local line
    export ODMR_SECRET=x
    while IFS= read -r line; do
        eval "run 64 \"\$ODMR\" $line"
        matches "$T/err" $'^odmr: [^\n]+$' "$line"
    done <<'END'

frobnicate
--frobnicate
provider --frobnicate
provider --help=x
provider -x
provider -Zt
queue --list=5
provider --listen
provider --listen nonsense
provider --timeout x
provider --timeout 0
provider --interval -1
provider --allow 300.1.1.1
provider --allow 10.0.0.0/33
provider --allow ''
provider --allow 10.0.0.0/
provider --allow ::1/129
provider --allow ::1/x
provider --allow 10.0.0.0/-0
provider --allow '10.0.0.0/ 8'
provider --allow 10.0.0.0/+8
provider --allow 10.0.0.0/0x8
provider --allow 10.0.0.0/2147483647
provider --allow ::1/4294967296
provider --listen '[::1'
provider --listen 127.0.0.1:65536
provider --max-sessions 0
provider --max-sessions 99999999999999999999
provider --max-per-address 0
provider --login-timeout 1x
provider --timeout 86401
provider --interval ''
provider --name 'two words'
provider word
customer
customer -u x
customer localhost
customer -u x localhost org
customer -u x localhost a.org,,b.org
customer -u x --queue q --smtp localhost:1 localhost
customer -u x --poll 0 localhost
customer -u x --timeout 0 localhost
customer -u '' localhost
customer -u x --smtp localhost:1 --exec true localhost
customer -u x -q q '[::1'
customer -u x -q q localhost:
customer -u x -q q localhost:65536
enqueue
enqueue -q
enqueue -f
enqueue --frobnicate eva@example.org
queue ../x
queue org
queue -q
queue --frobnicate
demo word
END
    run 64 "$ODMR" provider -Zt; matches "$T/err" 'unknown option -Z;'
    run 64 "$ODMR" queue --list=5; matches "$T/err" 'no value belongs to --list=5;'
    run 64 "$ODMR" provider --queue; matches "$T/err" 'option --queue needs a value;'
    unset ODMR_SECRET
    run 64 "$ODMR" customer -u x localhost
    for line in provider customer enqueue queue demo; do
        run 0 "$ODMR" "$line" --help
        match "$(head -n 1 "$T/out")" "^odmr $line"
        equal "$(cat "$T/err")" ''
    done
    run 0 "$ODMR" --help
    mv "$T/out" "$T/help"
    run 0 "$ODMR" help; same "$T/help" "$T/out"
    run 0 "$ODMR" queue --help
    mv "$T/out" "$T/help"
    run 0 "$ODMR" help queue; same "$T/help" "$T/out"
    run 64 "$ODMR" help nothing; matches "$T/err" 'nothing: no such command;'
    run 0 "$ODMR" --version
    matches "$T/out" '^odmr [0-9]+\.[0-9]+$'
}

# --help of each command has an example with options of the command, its exit codes and its files; that of provider and
# customer has their signals.
t_help_has_examples_exit_codes_and_files() {
    local command word
    for command in provider customer enqueue queue account demo; do
        run 0 "$ODMR" "$command" --help
        none "lines of $command --help over 110 columns" "$(awk 'length > 110' "$T/out")"
        has "$T/out" '^Example:$'
        has "$T/out" '^Exit: 0 [a-z ]*; .*64 wrong usage'
        has "$T/out" '^Files: '
        sed -n 's/^  odmr //p' "$T/out" > "$T/example"
        matches "$T/example" "^$command "
        for word in $(grep -oE -- ' -[^ ]*' "$T/example"); do
            grep -qE -- "^ +(-[a-z], )?$word( |\[|\$)" "$T/out" || fail "odmr $command has no option $word"
        done
    done
    for command in provider customer; do
        run 0 "$ODMR" "$command" --help
        has "$T/out" '^Signals: '; has "$T/out" 'SIGTERM and SIGINT'
    done
}

# The secret is the first line of its file without the line end, and the program of --exec does not inherit ODMR_SECRET.
t_customer_secret() {
    local file=$T/secret
    provider
    printf 'tanstaaf\r\nsecond line\n' > "$file"
    run 1 "$ODMR" customer -u example.org -s "$file" -q "$T/mail" "127.0.0.1:$PORT"
    ODMR_SECRET=wrong run 1 "$ODMR" customer -u example.org -s "$file" -q "$T/mail" "127.0.0.1:$PORT"
    : > "$file"; run 66 "$ODMR" customer -u example.org -s "$file" -q "$T/mail" "127.0.0.1:$PORT"
    echo > "$file"; run 66 "$ODMR" customer -u example.org -s "$file" -q "$T/mail" "127.0.0.1:$PORT"
    run 66 "$ODMR" customer -u example.org --secret-file "$T/none" -q "$T/mail" "127.0.0.1:$PORT"
    printf '%01500d' 7 > "$file"; run 65 "$ODMR" customer -u example.org -s "$file" "127.0.0.1:$PORT"
    ODMR_SECRET=$(< "$file") run 65 "$ODMR" customer -u example.org "127.0.0.1:$PORT"
    ODMR_SECRET=tanstaaf run 75 "$ODMR" customer -u example.org \
        --exec "{ env; tr '\0' '\n' < /proc/\$PPID/environ; } > $T/inherited" "127.0.0.1:$PORT"
    hasnt "$T/inherited" '^ODMR_SECRET=.\|tanstaaf'
}

# A secret's file that others can write is refused, and one that others can read causes a warning. A secret may have up
# to 1022 octets.
t_secret_files() {
    local secret
    secret=$(printf '%01022d' 0)
    mkdir "$T/queue"
    printf 'example.org:example.org:%s\n' "$secret" > "$T/accounts"; chmod 600 "$T/accounts"
    provider
    take() { run "$1" "$ODMR" customer -u example.org -s "$T/secret" -q "$T/mail" "127.0.0.1:$PORT"; }
    printf '%s\n' "$secret" > "$T/secret"; chmod 600 "$T/secret"; take 1; hasnt "$T/err" 'chmod'
    printf '%s\r\nmore\n' "$secret" > "$T/secret"; take 1
    printf '%s' "$secret" > "$T/secret"; take 1
    chmod 644 "$T/secret"; take 1; has "$T/err" "^odmr: $T/secret: everybody can read it; do: chmod 600 $T/secret\$"
    for mode in 602 620 666; do
        chmod $mode "$T/secret"; take 78; has "$T/err" 'others than its owner can write it; do: chmod 600'
    done
    chmod 600 "$T/secret"
    printf '%s0\n' "$secret" > "$T/secret"; take 65; has "$T/err" 'longer than 1022 octets'
    printf 'tan\0staaf\n' > "$T/secret"; take 65; has "$T/err" 'it has a NUL'
    printf 'tan\rstaaf\n' > "$T/secret"; take 65
    printf '\xef\xbb\xbftanstaaf\n' > "$T/secret"; take 65
    printf '\nx\n' > "$T/secret"; take 66; has "$T/err" 'it is empty'
    : > "$T/secret"; take 66
    printf '%s\n' "$secret" | run 0 "$ODMR" account a example.org
    has "$T/out" ":$secret\$"
    printf '%s0\n' "$secret" | run 65 "$ODMR" account a example.org
    printf 'tan\0staaf\n' | run 65 "$ODMR" account a example.org
    ODMR_SECRET=$secret run 1 "$ODMR" customer -u example.org -q "$T/mail" "127.0.0.1:$PORT"
    ODMR_SECRET=${secret}0 run 65 "$ODMR" customer -u example.org -q "$T/mail" "127.0.0.1:$PORT"
    ODMR_SECRET= run 66 "$ODMR" customer -u example.org -q "$T/mail" "127.0.0.1:$PORT"
}

# Without --queue mail is stored in ./mail, and an ATRN for a domain without access is refused as a whole.
t_customer_defaults() {
    provider
    put_letter one 1.a a@example.edu eva@example.org
    ODMR_SECRET=tanstaaf run 75 "$ODMR" customer -u example.org "127.0.0.1:$PORT" example.org other.example
    equal "$(waiting)" 1
    ODMR_SECRET=tanstaaf run 0 "$ODMR" customer -u example.org "127.0.0.1:$PORT" EXAMPLE.ORG
    equal "$(mailbox)" 1
}

# The customer prints one line for each session, nothing with --quiet, and a running count on a terminal.
t_customer_quiet_and_progress() {
    provider
    put_letter one 1.a a@example.edu eva@example.org
    customer 0 --quiet "127.0.0.1:$PORT"
    equal "$(cat "$T/err")" ''
    put_letter two 1.a a@example.edu eva@example.org
    customer 0 "127.0.0.1:$PORT"
    matches "$T/err" '^odmr: \[1\] 1 message, [0-9]+ octets received for example.org$'
    needs unbuffer
    put_letter three 1.a a@example.edu eva@example.org
    ODMR_SECRET=tanstaaf unbuffer "$ODMR" customer -u example.org -q "$T/mail" "127.0.0.1:$PORT" > "$T/terminal"
    match "$(tr '\r' '|' < "$T/terminal")" '^\|odmr: 0 messages, [0-9]+ octets \| +\|odmr: \[1\] 1 message,'
    # an error is on a separate line
    unset OVER_TLS # this test speaks in the clear
    serve peer_cuts
    ODMR_SECRET=tanstaaf unbuffer "$ODMR" customer -u example.org -n example.org -q "$T/mail" "127.0.0.1:$PORT" \
        > "$T/terminal"
    match "$(tr '\r' '|' < "$T/terminal")" \
        '^\|odmr: 0 messages, [0-9]+ octets \| +\|odmr: \[1\] [^|]*: the peer closed the connection'
}

# With --poll the customer collects mail again and again.
t_customer_polls() {
    local pid
    provider
    ODMR_SECRET=tanstaaf "$ODMR" customer -u example.org -q "$T/mail" --poll 1 "127.0.0.1:$PORT" 2> "$T/err" &
    pid=$!; STARTED+=("$pid")
    until_true shows "$LOG" 'no mail'
    put_letter one 1 a@example.edu eva@example.org
    until_true has_mail
    put_letter two 2 a@example.edu eva@example.org
    until_true two_mails
    kill "$pid"
}
has_mail() { [ "$(mailbox)" -ge 1 ]; }
two_mails() { [ "$(mailbox)" = 2 ]; }

# With --poll the customer ends at once if a retry cannot help, and waits longer after each other failure.
t_poll_knows_what_will_not_change() {
    local pid
    ODMR_SECRET=tanstaaf run 64 timeout "$PATIENCE" "$ODMR" customer -u example.org -q "$T/mail" --poll 1 \
        127.0.0.1:99999
    provider
    ODMR_SECRET=wrong "$ODMR" customer -u example.org -q "$T/mail" --poll 1 "127.0.0.1:$PORT" 2> "$T/err" & pid=$!
    STARTED+=("$pid")
    until_true shows "$T/err" 'the next attempt is in 2 seconds.*the next attempt is in 4 seconds'
    kill "$pid"; wait "$pid"
    equal $? 0 'exit of a customer that waits'
}

# After SIGTERM a customer with --poll completes the message under way and replies 421 to the next command, also with
# --exec.
t_poll_and_sigterm() {
    unset OVER_TLS # this test speaks in the clear
    local way pid
    perl_server
    for way in "-q $T/mail" "--exec $T/server"; do
        printf '%s\n' '#!/bin/sh' "exec $SERVER" > "$T/server"; chmod 755 "$T/server"
        rm -f "$T/half" "$T/stopped" "$T/done"
        serve peer_that_is_told
        # shellcheck disable=SC2086
        ODMR_SECRET=tanstaaf "$ODMR" customer -u example.org -n example.org $way --poll 1 "127.0.0.1:$PORT" \
            2> "$T/err" & pid=$!
        STARTED+=("$pid")
        until_true [ -e "$T/half" ]
        kill "$pid"; moment 0.2; touch "$T/stopped"
        wait "$pid"
        equal $? 0 "exit with $way"
        until_true [ -e "$T/done" ]
        peer_ok
    done
    equal "$(mailbox)" 1
    rm "$T/half"
    serve peer_that_pauses
    ODMR_SECRET=tanstaaf "$ODMR" customer -u example.org -n example.org -q "$T/mail" --poll 1 "127.0.0.1:$PORT" \
        2> "$T/err" & pid=$!
    STARTED+=("$pid")
    until_true [ -e "$T/half" ]
    kill "$pid"; wait "$pid"
    equal $? 0 'exit of a customer that waits for a command'
    peer_ok
}
peer_that_is_told() {
    reverse
    dialogue <<'END'
P: MAIL FROM:<a@b.example>
C: 250 *
P: RCPT TO:<x@example.org>
C: 250 *
P: DATA
C: 354 *
P: Subject: x
END
    touch "$T/half"; until_true [ -e "$T/stopped" ]; ask . '^250'; expect '^421 '; touch "$T/done"
}
peer_that_pauses() { reverse; touch "$T/half"; expect '^421 '; }

# If the receiver of --smtp cannot be reached, no ATRN is sent and the mail stays with the provider.
t_receiver_out_of_reach() {
    provider
    put_letter one 1 a@example.edu eva@example.org
    ODMR_SECRET=tanstaaf run 75 "$ODMR" customer -u example.org --smtp 127.0.0.1:1 "127.0.0.1:$PORT"
    ODMR_SECRET=tanstaaf run 75 "$ODMR" customer -u example.org --exec 'exit 1' "127.0.0.1:$PORT"
    hasnt "$LOG" connected
    equal "$(waiting)" 1
}

# With --smtp and --exec another receiver than ours gets the whole session.
t_receiver_by_smtp_and_exec() {
    local i
    sink
    provider
    put_many 20
    ODMR_SECRET=tanstaaf run 0 "$ODMR" customer -u example.org --trace --smtp "127.0.0.1:$SINK" "127.0.0.1:$PORT"
    has "$T/err" '20 messages, .* handed on'
    has "$T/err" '^\[[0-9]*\] P: \.\.\. [0-9]* octets of message \.\.\.$'
    equal "$(cat "$T"/sink/* | grep -c '^Text of')" 20
    ODMR_SECRET=tanstaaf run 1 "$ODMR" customer -u example.org --smtp "127.0.0.1:$SINK" "127.0.0.1:$PORT"
    put_many 20
    needs socat
    ODMR_SECRET=tanstaaf run 0 "$ODMR" customer -u example.org --exec "socat - TCP:127.0.0.1:$SINK" "127.0.0.1:$PORT"
    equal "$(cat "$T"/sink/* | grep -c '^Text of')" 40
    equal "$(waiting)" 0
}

# If a receiver does not end, the customer does not wait for it; if it ends early, the customer's error names it.
t_receivers_that_misbehave() {
    local start=$SECONDS
    provider
    put_letter one 1.a a@example.edu eva@example.org
    ODMR_SECRET=tanstaaf run 75 "$ODMR" customer -u example.org --timeout 1 \
        --exec 'trap "" HUP TERM PIPE; exec sleep 30' "127.0.0.1:$PORT"
    [ $((SECONDS - start)) -lt 15 ] || fail 'it waited for the program'
    ODMR_SECRET=tanstaaf run 75 "$ODMR" customer -u example.org --exec 'echo 220 me; exit' "127.0.0.1:$PORT"
    has "$T/err" '^odmr: .*local program: the \(peer closed the connection\|connection was lost\)$'
    equal "$(waiting)" 1
}

# The customer ends the program of --exec with all its children, and sends SIGTERM first.
t_exec_ends_as_a_process_group() {
    local start=$SECONDS
    PORT=1 relay 75 "sleep 600 & echo \$! > $T/child; wait; true" --timeout 1
    ! kill -0 "$(< "$T/child")" 2> /dev/null || fail 'a child of the program lives on'
    PORT=1 relay 75 \
        "(trap 'echo asked > $T/asked; sleep 600' TERM; echo > $T/ready; while :; do sleep 0.1; done) & wait; true" \
        --timeout 1
    has "$T/asked" asked
    [ $((SECONDS - start)) -lt 15 ] || fail 'it took too long'
}

# If the provider closes the connection, the relay first passes on all that arrived before, even half a message. QUIT
# and an immediate close are a proper end, with TLS and without.
t_relay_passes_on_what_came_before_the_end() {
    local n plain
    perl_server
    authority
    printf '%b' "$ONE_MORE${ONE_MORE}QUIT\r\n" > "$T/batch"
    perl_provider close
    plain=$PORT
    for n in 1 2 3; do
        rm -f "$T/heard" "$T/contents"
        relay 0 "$SERVER"
        has "$T/err" '2 messages, .* handed on'
        equal "$(tail -n 1 "$T/heard" | tr -d '\r')" QUIT
    done
    noise --cert "$T/server.pem" "$plain"
    PORT=$NOISE relay 0 "$SERVER" --tls --ca "$T/ca.crt"
    has "$T/err" '2 messages, .* handed on'
    printf '%b' "${ONE_MORE}MAIL FROM:<a@b.example>\r\nRCPT TO:<x@example.org>\r\nBDAT 99 LAST\r\nhalf" > "$T/batch"
    rm "$T/heard" "$T/contents"
    relay 75 "$SERVER"
    equal "$(tr -d '\r\n' < "$T/contents")" 'n: 1half'
    has "$T/heard" '^(end)$'
}

# If the provider closes its direction after its commands, all replies are still sent back.
t_relay_brings_replies_back_after_a_half_close() {
    local n
    perl_server
    for ((n = 0; n < 9; n++)); do printf '%b' "$ONE_MORE"; done > "$T/batch"
    printf 'QUIT\r\n' >> "$T/batch"
    perl_provider half
    relay 0 "$SERVER"
    until_true [ -e "$T/replies" ]
    equal "$(grep -c '^250 kept' "$T/replies") $(grep -c '^221 bye' "$T/replies")" '9 1'
}

# If a receiver is lost after its greeting, or has sent 421, the relay connects to it again, once.
t_relay_reaches_a_lost_receiver_again() {
    local words
    perl_server
    printf '%b' "${ONE_MORE}QUIT\r\n" > "$T/batch"
    perl_provider close
    for words in '220 me' '220 me\r\n421 idle for too long'; do
        rm -rf "$T/once" "$T/heard"
        relay 0 "if mkdir $T/once; then printf '$words\r\n'; exit; else exec $SERVER; fi"
        has "$T/err" '1 message, .* handed on'
        has "$T/heard" '^QUIT'
    done
    rm -rf "$T/once"
    relay 75 "if mkdir $T/once; then echo '220 me'; fi; exit"
    has "$T/err" 'does not take mail (.*); the mail stays with the provider$'
}

# The reply to the end of a message may take ten minutes, whatever --timeout says, and other replies --timeout (RFC
# 5321, 4.5.3.2.6). Commands with trailing blanks are understood.
t_relay_waits_for_the_final_reply() {
    unset OVER_TLS # this test speaks in the clear
    local server
    perl_server 4
    serve peer_with_trailing_blanks
    relay 0 "$SERVER" --timeout 2
    peer_ok
    has "$T/err" '1 message, .* handed on'
    perl_provider stay
    printf 'NOOP\r\n' > "$T/batch"
    relay 75 "$SERVER" --timeout 2
    has "$T/err" 'both sides were silent for longer than --timeout'
    has "$here/odmr.c" '^#define FINAL_REPLY_TIMEOUT 600 '
}

peer_with_trailing_blanks() {
    provide; expect '^220 '
    dialogue <<'END'
P: EHLO x
C: ...
C: 250 *
P: MAIL FROM:<a@b.example>
C: 250 *
P: RCPT TO:<x@example.org>\x20
C: 250 *
P: DATA\x20
C: 354 *
P: Subject: x
P: .
C: 250 *
P: quit\x20
C: 221 *
END
}

# If the receiver never replies or the provider stops in the middle of a message, the relay ends after --timeout.
# Messages that were not accepted stay with the provider, and the receiver sees the end of the connection.
t_relay_and_a_silent_side() {
    unset OVER_TLS # over TLS the log names another peer
    local start=$SECONDS content port
    perl_server
    provider
    put_letter one 1.a a@example.edu eva@example.org
    relay 75 "echo 220 me; cat > $T/unanswered; echo end >> $T/unanswered" --timeout 2
    until_true settled
    equal "$(tail -n 1 "$T/unanswered") $(waiting)" 'end 1'
    port=$PORT
    serve peer_that_only_greets
    ODMR_SECRET=tanstaaf run 75 "$ODMR" customer -u example.org --timeout 2 --smtp "127.0.0.1:$PORT" "127.0.0.1:$port"
    until_true settled
    equal "$(tail -n 1 "$T/unanswered") $(waiting)" 'end 1'
    perl_provider stay
    for content in 'BDAT 99 LAST\r\nhalf' 'DATA\r\nSubject: half'; do
        printf '%b' "MAIL FROM:<a@b.example>\r\nRCPT TO:<x@example.org>\r\n$content" > "$T/batch"
        relay 75 "$SERVER" --timeout 2
        has "$T/err" 'both sides were silent for longer than --timeout'
        hasnt "$T/err" '1 message'
        until_true shows "$T/heard" '\(end\)'; rm "$T/heard"
    done
    [ $((SECONDS - start)) -lt 40 ] || fail "it took $((SECONDS - start)) s"
}
peer_that_only_greets() { say '220 me'; cat <&"$LINE" > "$T/unanswered"; echo end >> "$T/unanswered"; }

# If the provider uses the receiver's STARTTLS, the relay passes octets on and counts nothing.
t_relay_knows_when_tls_hides_the_session() {
    perl_server
    printf 'STARTTLS\r\n\x16\x03\x01 BDAT 1000000 LAST\r\nDATA\r\nQUIT\r\n' > "$T/batch"
    perl_provider half
    relay 0 "$SERVER" --trace
    has "$T/err" 'use TLS: the number of messages is unknown$'
    has "$T/err" 'C: (from here on the two speak TLS'
    equal "$(sed '1,/(from here on/d' "$T/err" | grep -c '^\[')" 0
    until_true [ -e "$T/replies" ]
    equal "$(grep -c '250 OK' "$T/replies")" 3
}

# The demo sends the same mail as the RFC does, with PIPELINING and with CHUNKING, each time with fewer round trips. In
# 80 columns it shows the states, the requirements, a refused recipient, and the mail on either side at the end.
t_demo() {
    local plain pipelining chunking
    run 0 "$ODMR" demo
    at_80 "$T/out"
    equal "$(cat "$T/err")" ''
    equal "$(grep -c '^    | \(INITIAL\|.*AUTHENTICATED\|.*REVERSED\) |' "$T/out")" 5
    has "$T/out" '^\[1\] |- ATRN example.org,example.com -*>| 5.2.1-a  asks for mail$'
    has "$T/out" '^\[1\] |<-* 250 OK now reversing the connection -| 5.2.1-j  mail: roles turn$'
    has "$T/out" '^\[1\] |- 550 5.1.1 Nobody of that name here -*>| 4-e      sender is told$'
    has "$T/out" '^    <nobody@example.com>$'
    equal "$(grep -c '^What the provider holds now: nothing$' "$T/out")" 3
    equal "$(sed -n '/^What the customer has now/,/^The customer waited/p' "$T/out" | grep -c '^  from <.*> to <')" 9
    hasnt "$T/out" 'Return'
    sed '1,/^Round trips/d' "$T/out" > "$T/counts"
    read -r plain pipelining chunking < <(grep -o '[0-9]*$' "$T/counts" | tr '\n' ' ')
    [ "$plain" -gt "$pipelining" ] && [ "$pipelining" -gt "$chunking" ] && [ "$chunking" -gt 1 ] ||
        fail "round trips: $plain, $pipelining, $chunking"
    run 64 "$ODMR" demo example.org
    run 64 "$ODMR" demo --mechanism PLAIN
    run 64 "$ODMR" demo --mechanism ROT13
}

# The demo can show one of the three sessions alone. With --plain each command waits for the reply before it.
t_demo_one_way() {
    local way verb verbs
    for way in plain pipelining chunking; do
        run 0 "$ODMR" demo "--$way"
        at_80 "$T/out"
        equal "$(grep -c '^    | \(INITIAL\|.*AUTHENTICATED\|.*REVERSED\) |' "$T/out")" 3
        hasnt "$T/out" '^\[2\]\|^Round trips'
        verbs='250-CHUNKING BDAT'
        [ "$way" = chunking ] || verbs=DATA
        [ "$way" = pipelining ] && verbs='250-PIPELINING DATA'
        for verb in $verbs; do has "$T/out" "^\\[1\\] |.* $verb "; done
        [ "$way" = chunking ] || hasnt "$T/out" 'CHUNKING -\|BDAT'
    done
    run 0 "$ODMR" demo --plain
    hasnt "$T/out" 'PIPELINING'
    # commands and replies alternate; a multi-line reply and a content count as one
    sed -n '/REVERSED/,$p' "$T/out" | grep '^\[1\]' | grep -v '|- [0-9]*-\| \.\.\. .* of message \.\.\. \|^.....- 220' |
        sed 's/^\[1\] |\(.\).*/\1/' | uniq -d > "$T/twice"
    equal "$(cat "$T/twice")" ''
}

# For a session that fails, the demo shows the mail on both sides after that session and after the next one.
t_demo_that_fails() {
    local how held has later reply
    while read -r how held has later reply; do
        run 0 "$ODMR" demo --fail="$how" < /dev/null
        at_80 "$T/out"
        grep -v '^odmr: \[1\] ' "$T/err" > "$T/unexpected"
        equal "$(cat "$T/unexpected")" '' "standard error of $how"
        has "$T/out" "^\\[1\\] |.* $reply"
        equal "$(sed -n '/^What the provider holds for/,/^$/p' "$T/out" | grep -c '^  from')" 3 "queued before $how"
        equal "$(sed -n '/^What the provider holds now/,/^What the customer/p' "$T/out" | grep -c '^  from')" "$held" \
            "queued after $how"
        equal "$(sed -n '/^What the customer has now/,/^$/p' "$T/out" | grep -c '^  from')" "$has" "stored after $how"
        equal "$(sed -n '/^What the customer has then/,$p' "$T/out" | grep -c '^  from')" "$later" "stored then: $how"
        [ "$how" = refuse ] || has "$T/out" '^What the provider holds then: nothing$'
    done << 'END'
cut 2 1 3 354
refuse 0 2 0 550 5.1.1
later 1 2 3 452 4.3.1
lost-reply 2 2 4 250 2.0.0 OK, message stored
foreign 3 0 3 450 ATRN request refused
locked 3 0 3 451 Unable to process
END
    run 0 "$ODMR" demo --fail refuse
    has "$T/out" '^    <office@example.com>$'
    run 0 "$ODMR" demo --fail refuse --mechanism SCRAM-SHA-256
    run 64 "$ODMR" demo --fail=badly
    run 64 "$ODMR" demo --fail=cut --tls
    run 64 "$ODMR" demo --fail=cut --plain
}

# The demo runs with TLS and each mechanism.
t_demo_with_tls_and_each_mechanism() {
    local mechanism
    for mechanism in CRAM-MD5 SCRAM-SHA-256 SCRAM-SHA-256-PLUS EXTERNAL PLAIN; do
        run 0 "$ODMR" demo --tls --mechanism "$mechanism"
        at_80 "$T/out"
        has "$T/out" '^\[1\] |- STARTTLS '
        has "$T/out" "^\[1\] |- AUTH $mechanism"
        has "$T/out" '| 5.1.2-b  logged in: now$'
    done
}

# If its customer cannot connect, the demo ends; if it cannot write to /tmp, it says so.
# not with: SANITIZE, OVER_TLS
t_demo_that_cannot_work() {
    local code=0
    make -s -C "$here" build/fail.so > /dev/null || skip 'the library that makes calls fail cannot be built'
    timeout "$PATIENCE" env FAIL=connect FAIL_AT=1 FAIL_ERRNO=ENOMEM FAIL_LOG="$T/fired" \
        LD_PRELOAD="$here/build/fail.so" "$ODMR" demo > "$T/out" 2> "$T/err" || code=$?
    equal "$code" 75 'exit of a demo that cannot connect'
    unshare -m true 2> /dev/null || skip 'needs root, to have another /tmp'
    cp "$ODMR" /dev/shm/odmr.$$ || skip 'no /dev/shm'
    code=0
    unshare -m bash -c 'mount -t tmpfs -o ro none /tmp && exec "$0" demo' /dev/shm/odmr.$$ > /dev/null \
        2> /dev/shm/odmr.$$.err || code=$?
    mv /dev/shm/odmr.$$.err "$T/err"; rm /dev/shm/odmr.$$
    equal "$code" 73 'exit without /tmp'
    has "$T/err" '^odmr: demo: cannot make a scratch directory in /tmp: '
}

# With --step the demo names the next command and, on a terminal, waits for a key; NO_COLOR turns the colours off.
t_demo_step_by_step() {
    yes '' | head -n 100 | run 0 "$ODMR" demo --step
    [ "$(grep -c '(Return, q, ?)' "$T/out")" -ge 15 ] || fail 'too few stops'
    has "$T/out" '^    Next, the customer: EHLO, says who it is. (Return, q, ?) $'
    has "$T/out" '^    Next, the provider: RCPT, a recipient. (Return, q, ?) $'
    run 0 "$ODMR" demo --step # without input it does not wait
    printf '\n?\nq\n' | run 0 "$ODMR" demo --step
    equal "$(grep -c '^    Next, ' "$T/out")" 3
    has "$T/out" '^    Return: the next command. q: quit. ?: this help.$'
    hasnt "$T/out" 'ATRN example.org'
    # on a terminal it waits
    needs unbuffer
    { printf '\n'; sleep 5; } | timeout 3 unbuffer -p "$ODMR" demo --step > "$T/terminal"
    equal $? 124 'exit of a demo that waits'
    NO_COLOR=1 unbuffer "$ODMR" demo > "$T/plain"; unbuffer "$ODMR" demo > "$T/coloured"
    hasnt "$T/plain" $'\e'
    has "$T/coloured" $'\e'
}

# If a key or a closed terminal interrupts the demo, none of its files and processes remains.
t_demo_interrupted() {
    local signal pid keys dir
    mkfifo "$T/keys"
    for signal in INT TERM HUP; do
        : > "$T/out"
        "$ODMR" demo --step < "$T/keys" >> "$T/out" 2>&1 & pid=$!; STARTED+=("$pid")
        exec {keys}> "$T/keys"
        until_true shows "$T/out" 'Next, the customer'
        dir=$(readlink /proc/"$pid"/fd/* | sed -n 's,^\(/.*/odmr-demo-[^/]*\)/queue0$,\1,p')
        [ -d "$dir" ] || fail "no such directory: $dir"
        kill -"$signal" "$pid"
        wait "$pid"
        exec {keys}>&-
        [ ! -e "$dir" ] || fail "after SIG$signal there is still $dir"
    done
}

# ladder_at COLUMNS OPTION...: writes the lines of the demo's ladder to $T/ladder.
ladder_at() {
    COLUMNS=$1 run 0 "$ODMR" demo "${@:2}"
    grep -E '^\[|^    ' "$T/out" | grep -vE '<nobody@|550 5.1.1 Nobody of that name here$' > "$T/ladder"
    ! grep -E ".{$1}" "$T/ladder" || fail "wider than $1 columns"
}

# The ladder is as wide as the terminal, so the text of an arrow is cut at 60 columns and whole at 140.
t_ladder_width() {
    needs unbuffer
    ladder_at 60 --tls --mechanism SCRAM-SHA-256-PLUS
    has "$T/ladder" '^\[1\] |- ATRN exam.*\.\.\. ->| 5.2.1-a  asks for mail$'
    ladder_at 60 --plain
    ladder_at 140
    has "$T/ladder" '^\[1\] |- ATRN example.org,example.com -*>| 5.2.1-a  asks for mail$'
    hasnt "$T/ladder" '[^ ]\.\.\. -'
    COLUMNS=140 unbuffer sh -c 'stty columns 70; exec "$0" demo --plain' "$ODMR" > "$T/out"
    tr -d '\r' < "$T/out" | sed 's/\x1b\[[0-9]*m//g' | grep '^\[1\]' > "$T/ladder"
    has "$T/ladder" '.\{60\}'
    ! grep -E '.{70}' "$T/ladder" || fail 'wider than the terminal'
}

# Below its arrow the ladder shows decoded base64 without values made from a secret. It marks TLS and explains the ids.
t_ladder_decodes() {
    run 0 "$ODMR" demo --plain
    has "$T/out" '^      = challenge: <[0-9a-z]*'
    has "$T/out" '^      = response: example.org (not shown)$'
    hasnt "$T/out" '==== TLS'
    equal "$(grep -c '^    An id like 5.2.1-g: see RFC2645.txt' "$T/out")" 1
    run 0 "$ODMR" demo --tls --mechanism SCRAM-SHA-256
    has "$T/out" '^      = client-first-message: n,,n=example.org,r='
    has "$T/out" '^      = server-first-message: r='
    has "$T/out" ',i=4096$'
    has "$T/out" '^      = client-final-message: c=biws,r='
    has "$T/out" 'p=(not shown)$'
    has "$T/out" '^      = server-final-message: v='
    equal "$(grep -c '^    ==== TLS: from here on all is encrypted (TLSv1.3) ====$' "$T/out")" 3
    equal "$(grep -c '^    An id like 5.2.1-g: see RFC2645.txt' "$T/out")" 1
    run 0 "$ODMR" demo --tls --plain --mechanism EXTERNAL
    has "$T/out" '^      = name: example.org$'
    run 0 "$ODMR" demo --tls --plain --mechanism PLAIN
    hasnt "$T/out" '^      = \|a secret'
    # nothing of an unknown response is shown; other text of the peer is escaped
    provider --trace=ladder
    dial; expect '^220'; ask 'EHLO x' '^250'
    ask 'AUTH CRAM-MD5' '^334'; ask "$(printf 'eva tanstaaf' | base64)" '^535'
    until_true shows "$LOG" '= response: [(]not shown[)]'
    ask 'AUTH EXTERNAL bmFtZRtbMzFt' '^5'
    until_true shows "$LOG" '= name: name.x1b.31m'
}

# With PIPELINING a number joins a refused recipient, and the end of each message, to its reply.
t_ladder_numbers_join_replies() {
    local number
    for number in pipelining chunking; do
        run 0 "$ODMR" demo "--$number"
        number=$(sed -n 's/^\[1\] |<\([0-9]*\)-* RCPT TO:<nobody@example.com> -|.*/\1/p' "$T/out")
        [ "$number" -gt 5 ] || fail "no number"
        has "$T/out" "^\\[1\\] |- 550 5.1.1 Nobody of that name here -*$number>| 4-e"
        # each number is at a command and at its reply
        grep -o '^\[1\] |<[0-9]*' "$T/out" | grep -o '[0-9]*$' | sort > "$T/commands"
        grep -o '[0-9]*>|' "$T/out" | tr -d '>|' | grep . | sort > "$T/replies"
        [ "$(wc -l < "$T/commands")" -gt 9 ] || fail 'too few numbers'
        same "$T/commands" "$T/replies"
    done
    run 0 "$ODMR" demo --plain
    hasnt "$T/out" '^\[1\] |<[0-9]\|[0-9]>|'
}

# The trace of a real session is the same ladder on either side, and hostile lines do not damage it.
t_trace_ladder() {
    local i long
    provider --trace=ladder
    long=$(printf 'long%.0s' {1..12})
    for i in {1..150}; do put_letter "$i" "$i.a" "$long@example.edu" eva@example.org; done
    customer 0 --trace=ladder "127.0.0.1:$PORT"
    until_true settled
    grep '^\[' "$T/err" > "$T/customer"; grep '^\[' "$LOG" > "$T/provider"
    at_80 "$T/customer"; at_80 "$T/provider"
    equal "$(grep -c '| 4-e      now it is theirs$' "$T/customer")" 150
    equal "$(grep -c '| 4-e      now it is theirs$' "$T/provider")" 150
    dial; expect '^220'; say $'\e[31mEHLO \x80\xff\x00'; expect '^500'; ask "EHLO $(printf 'x%.0s' {1..200})" '^250'
    ask ATRN '^530 '; ask HELO '^502 '
    until_true shows "$LOG" '502 Command not implemented -'
    has "$LOG" '^\[2\] |<-* 502 Command not implemented -| 5.4-a    not spoken here$'
    has "$LOG" '^\[2\] |<-* 530 Authentication required -| 5.2.1-b  log in first$'
    grep '^\[2' "$LOG" > "$T/hostile"; at_80 "$T/hostile"
    run 64 "$ODMR" provider --trace=circle
    matches "$T/err" 'there is --trace'
}

# ---- The program: the queue --------------------------------------------------------------------------

# odmr enqueue writes one file for each domain, with the envelope in the first lines, and refuses addresses that are not
# mailboxes.
t_enqueue() {
    mkdir "$T/queue"
    letter one | run 0 "$ODMR" enqueue -q "$T/queue" -f a@example.edu eva@Example.ORG bob@example.org x@example.com
    equal "$(cat "$T"/queue/example.org/new/*)" \
        "$(printf 'Return-Path: <a@example.edu>\nDelivered-To: eva@Example.ORG\nDelivered-To: bob@example.org\n';
            letter one)"
    equal "$(cat "$T"/queue/example.com/new/*)" \
        "$(printf 'Return-Path: <a@example.edu>\nDelivered-To: x@example.com\n'; letter one)"
    equal "$(ls "$T"/queue/example.*/tmp | grep -v :)" ''
    rm -r "$T"/queue/*
    printf 'From me Mon\nDelivered-To: earlier@hop.example\n\nx\n' |
        run 0 "$ODMR" enqueue -q "$T/queue" -- eva@example.org
    local date='[A-Z][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} [0-9]{4} [0-9:]{8} [+-][0-9]{4}' wanted
    wanted='^Return-Path: <>\|Delivered-To: eva@example.org\|Received: by [^|]* \(odmr enqueue\);\|'$'\t'$date
    wanted+='\|Delivered-To: earlier@hop.example\|\|x\|$'
    match "$(tr '\n' '|' < "$(echo "$T"/queue/example.org/new/*)")" "$wanted"
    provider
    turn
    equal "$(sed -n '/^RCPT/,$p' "$T/got/1" | tr -d '\r' | tr '\n' '|' | sed 's/by .*[0-9]|/by X|/')" \
        'RCPT TO:<eva@example.org>||Received: by X|Delivered-To: earlier@hop.example||x|'
    run 65 "$ODMR" enqueue -q "$T/queue" eva < /dev/null
    ulimit -Ss hard # room for so many arguments
    # shellcheck disable=SC2046
    run 65 "$ODMR" enqueue -q "$T/queue" $(seq -f '%.0f@b.c' 100001) < /dev/null
    has "$T/err" '^odmr: enqueue: more than 100000 recipients; nothing is queued$'
    run 65 "$ODMR" enqueue -q "$T/queue" eva@org < /dev/null
    run 65 "$ODMR" enqueue -q "$T/queue" eva@example.org $'e\nva@example.org' < /dev/null
    run 65 "$ODMR" enqueue -q "$T/queue" -f 'a>b@example.edu' eva@example.org < /dev/null
    run 75 "$ODMR" enqueue -q "$T/none" eva@example.org < /dev/null
    touch "$T/queue/not-a-directory.example"
    letter one | run 75 "$ODMR" enqueue -q "$T/queue" x@example.com eva@not-a-directory.example
    equal "$(waiting)" 0
}

# All octets of a message are queued in each of its domains. The sizes are near multiples of the pieces that enqueue
# copies.
t_enqueue_copies_every_octet() {
    local size
    mkdir "$T/queue"
    for size in 0 1 65535 65536 65537 131070 131071 131072 131073 262142 262143 262144 262145; do
        { printf 'A: b\n\n'; head -c "$size" /dev/zero | tr '\0' x; } > "$T/message"
        head -c "$size" "$T/message" > "$T/part"; truncate -s "$size" "$T/part"
        run 0 "$ODMR" enqueue -q "$T/queue" eva@example.org bob@example.com < "$T/part"
        tail -n +3 "$T"/queue/example.org/new/* | cmp - "$T/part" || fail "$size octets for example.org"
        tail -n +3 "$T"/queue/example.com/new/* | cmp - "$T/part" || fail "$size octets for example.com"
        rm -r "$T"/queue/*
    done
}

# odmr enqueue removes the first line "From " of mbox, and keeps a field "From" with blanks before its colon.
t_enqueue_keeps_a_from_field() {
    local first
    mkdir "$T/queue"
    for first in 'From : Ann <a@example.edu>' 'From  : Ann' $'From \t: Ann' 'From: Ann'; do
        printf '%s\nSubject: x\n\nt\n' "$first" | run 0 "$ODMR" enqueue -q "$T/queue" eva@example.org
        equal "$(sed -n 3p "$T"/queue/example.org/new/*)" "$first"
        rm -r "$T"/queue/*
    done
    for first in 'From a@b Mon Jan  1 00:00:00 2026' 'From  x:y' 'From '; do
        printf '%s\nSubject: x\n\nt\n' "$first" | run 0 "$ODMR" enqueue -q "$T/queue" eva@example.org
        equal "$(sed -n 3p "$T"/queue/example.org/new/*)" 'Subject: x' "$first"
        rm -r "$T"/queue/*
    done
}

# Whatever call fails, a message for several domains is queued in all of them or in none. A failure leaves no file. If
# the process is killed after the last file is on disk, a part of the files can be visible.
# not with: SANITIZE, OVER_TLS
t_enqueue_for_all_domains_or_none() {
    local call n code
    make -s -C "$here" build/fail.so > /dev/null || skip 'the library that makes calls fail cannot be built'
    failing() { # CALL N ERROR, into CODE
        CODE=0
        letter one | (FAIL=$1 FAIL_AT=$2 FAIL_ERRNO=$3 FAIL_LOG=$T/fired LD_PRELOAD=$here/build/fail.so exec \
            "$ODMR" enqueue -q "$T/queue" \
            a@example.org b@example.com c@example.net) > "$T/out" 2> "$T/err" || CODE=$?
    }
    mkdir -p "$T/queue"/example.{org,com,net}/{new,cur,tmp}
    for n in 1 2 3; do
        failing fsync "$n" KILL 2> /dev/null
        equal "$CODE $(waiting)" '137 0' "killed before fsync $n: exit, queued"
        rm "$T"/queue/*/tmp/*
    done
    for call in fsync renameat openat; do
        for n in 1 2 3 4 5 6; do
            failing "$call" "$n" EIO
            [ "$CODE" != 0 ] || { equal "$(waiting)" 3 "queued, exit 0, $call $n"; rm "$T"/queue/*/new/*; }
            equal "$(find "$T/queue" -type f)" '' "left after $call $n failed, exit $CODE"
            code+=" $CODE"
        done
    done
    equal "$code" "$(printf ' 75%.0s' {1..6}) 75 75 75 0 0 0 75 75 75 75 75 75" \
        'exits when fsync, renameat, openat failed'
}

# Files that root queues or receives in another user's directory belong to the owner and group of that directory. Any
# other user is refused.
t_enqueue_as_root() {
    needs_capabilities 'user to change to' CHOWN SETUID
    needs setpriv
    local path
    chmod 755 "$T"; cp "$ODMR" "$T/odmr"
    mkdir -m 700 "$T/queue" "$T/mail"; accounts; chown nobody:daemon "$T/accounts" "$T/queue" "$T/mail"
    letter one | run 0 "$ODMR" enqueue -q "$T/queue" -f a@example.edu eva@example.org bob@example.com
    mkdir -m 700 "$T/queue/other.example" "$T/queue/root.example"; chown nobody:daemon "$T/queue/other.example"
    # the provider could not read root's directory
    letter two | run 75 "$ODMR" enqueue -q "$T/queue" eva@other.example eva@root.example
    rmdir "$T/queue/root.example"
    mkdir "$T/elsewhere"; mkdir -p "$T/queue/link.example"; ln -s "$T/elsewhere" "$T/queue/link.example/tmp"
    chown -R nobody "$T/queue/link.example"
    letter two | run 75 "$ODMR" enqueue -q "$T/queue" eva@link.example
    equal "$(ls "$T/elsewhere")" '' 'what root wrote where a link led'
    rm -r "$T/queue/link.example"
    letter two | run 0 "$ODMR" enqueue -q "$T/queue" eva@other.example
    provider --user nobody
    customer 0 "127.0.0.1:$PORT" example.org
    for path in "$T"/queue/*{,/*,/*/*} "$T"/mail/*{,/*,/*/*}; do
        equal "$(stat -c %U:%G "$path")" nobody:daemon "owner of $path"
    done
    equal "$(find "$T/queue" "$T/mail" -name '.*' | wc -l)" 0 'directories without a name'
    equal "$(waiting) $(mailbox)" '2 1'
    chmod 777 "$T/queue"
    letter two |
        run 75 setpriv --reuid daemon --regid daemon --clear-groups "$T/odmr" enqueue -q "$T/queue" eva@example.net
    matches "$T/err" "^odmr: $T/queue belongs to another user.* nothing is written; run odmr as that user or as root$"
    equal "$(waiting)" 2
    letter two |
        run 0 setpriv --reuid nobody --regid daemon --clear-groups "$T/odmr" enqueue -q "$T/queue" eva@example.net
}

# A failed enqueue leaves no file in any domain, and the first line of a message cannot extend its envelope.
t_enqueue_edges() {
    local box=$T/queue/example.org/new
    mkdir "$T/queue"
    # a first line that would continue our field above it does not add a recipient
    printf ' <mallory@example.org>\nSubject: x\n\nt\n' | run 0 "$ODMR" enqueue -q "$T/queue" eva@example.org
    printf '\tmallory@example.org\n' | run 0 "$ODMR" enqueue -q "$T/queue" eva@example.org
    run 0 "$ODMR" queue -q "$T/queue" -l
    equal "$(grep -c '      to <eva@example.org>' "$T/out") $(grep -c mallory "$T/out")" '2 0'
    rm "$box"/*
    # an empty message, quoted mailboxes, --from '<>', CRLF, one domain in two spellings
    run 0 "$ODMR" enqueue --queue "$T/queue" --from '<>' -- '"a b"@example.org' < /dev/null
    equal "$(cat "$box"/*)" $'Return-Path: <>\nDelivered-To: "a b"@example.org'
    rm "$box"/*
    printf 'A: b\r\n\r\nt\r\n' | run 0 "$ODMR" enqueue -q "$T/queue" -f '"x y"@example.edu' a@example.org b@EXAMPLE.org
    equal "$(cat "$box"/*)" \
        $'Return-Path: <"x y"@example.edu>\nDelivered-To: a@example.org\nDelivered-To: b@EXAMPLE.org\nA: b\r\n\r\nt\r'
    rm "$box"/*
    # if the disk is full, the exit code is 75 and no file is left
    ( ulimit -f 64; head -c 100000 /dev/zero | run 75 "$ODMR" enqueue -q "$T/queue" a@example.org b@example.com )
    has "$T/err" 'File too large; try again later'
    equal "$(find "$T/queue" -type f)" ''
    # if one of two domains cannot be written, nothing is queued for the other
    mkdir -p "$T/queue/example.net"; touch "$T/queue/example.net/new"
    letter one | run 75 "$ODMR" enqueue -q "$T/queue" a@example.org b@example.net
    has "$T/err" 'Not a directory; try again later'
    equal "$(find "$T/queue" -type f)" "$T/queue/example.net/new"
}

# odmr queue shows the number, size and age of each domain's messages, and with -l each message with its escaped
# recipients.
t_queue_shows_what_waits() {
    mkdir -p "$T/queue"
    run 0 "$ODMR" queue -q "$T/queue"
    equal "$(wc -l < "$T/out")" 1
    put_letter one 1700000000.a $'x\x1b]0;y@example.edu' eva@example.org
    put_letter one 1700000001.a a@example.edu $'e\xc3\xa9va@example.org' bob@example.org
    put_letter two 1600000000.a '' eva@example.com
    run 0 env TZ=UTC "$ODMR" queue -q "$T/queue"
    has "$T/out" '^example.com  *1  *[0-9]*  2020-09-13 12:26:40  *0$'
    has "$T/out" '^example.org  *1  *[0-9]*  2023-11-14 22:13:20  *1$'
    run 0 "$ODMR" queue -q "$T/queue" -l example.org
    has "$T/out" '^      to <e\\xc3\\xa9va@example.org>$'
    has "$T/out" 'held: its Return-Path is not a mailbox'
    hasnt "$T/out" example.com
    ! grep -q $'\x1b' "$T/out" || fail 'an escape character was printed'
    run 66 "$ODMR" queue -q "$T/none"
    run 0 "$ODMR" queue -q "$T/queue" EXAMPLE.com nobody.example
    equal "$(sed 1d "$T/out" | awk '{ print $1, $2, $NF }' | tr '\n' '|')" 'example.com 1 0|nobody.example 0 0|'
}

# odmr queue shows, with the reason, mail that no ATRN can request, under names that are not domains, files and links,
# and with -a under domains without an account. If a domain cannot be read or the output cannot be written, the exit
# code is 75.
t_queue_shows_what_nobody_can_ask_for() {
    mkdir -p "$T/queue"/{localhost,example.org,.hidden}/{new,cur,tmp} \
        "$T/queue"/{linked.example,misspelt.example}/{cur,tmp}
    accounts
    ln -s /tmp "$T/queue/linked.example/new"; : > "$T/queue/stray"; : > "$T/queue/file.example"
    put_letter one 1.a a@example.edu eva@misspelt.example
    put_letter one 1.a a@example.edu eva@example.org
    put_letter one 1.a a@example.edu $'x\x1b@localhost'
    run 75 "$ODMR" queue -q "$T/queue" -a "$T/accounts"
    has "$T/out" '^localhost  *-  *-  *-  *-  not a domain: no ATRN can name it$'
    has "$T/out" '^stray  *-  *-  *-  *-  not a domain: no ATRN can name it$'
    has "$T/out" '^file.example  *-  *-  *-  *-  not a directory: no mail can be in it$'
    has "$T/out" '^linked.example  *-  *-  *-  *-  cannot be read$'
    has "$T/out" '^misspelt.example  *1 .*  no account has it$'
    has "$T/out" '^example.org  *1 .* 0$'
    hasnt "$T/out" hidden
    rm -r "$T/queue"/{file,linked}.example
    run 0 "$ODMR" queue -q "$T/queue"
    hasnt "$T/out" 'no account'
    chmod 644 "$T/accounts"
    run 78 "$ODMR" queue -q "$T/queue" -a "$T/accounts"
    local code=0
    "$ODMR" queue -q "$T/queue" > /dev/full 2> "$T/err" || code=$?
    equal "$code" 74 'exit when the output fails'
    has "$T/err" '^odmr: queue: cannot write the table: No space left on device$'
}

# odmr queue -l shows the readable part of the envelope of held mail, escaped.
t_queue_lists_the_envelope_of_held_mail() {
    local box=$T/queue/example.org/new
    mkdir -p "$box" "$T/queue/example.org/cur"
    printf 'Return-Path: <s@b.example>\nDelivered-To: x@other.example\nX-Original-To: y@third.example\n\nx\n' \
        > "$box/1.a"
    printf '%s\n' 'Return-Path: <a b@example.edu>' 'Delivered-To: zoe@example.org, "q, r"@example.org,' \
        $'\tfolded@example.org' '' x > "$box/2.b"
    printf 'Delivered-To: struck=example.org\nDelivered-To: e\033[31mva\n\nDelivered-To: body@example.org\n' \
        > "$box/3.c"
    : > "$box/4.d"; mkfifo "$box/5.e"; ln -s /etc/passwd "$box/6.f"
    printf 'Return-Path: <a@example.edu>\n%02000d\n' 1 > "$box/7.g"
    printf '%s\n' 'Delivered-To: z@other.example' 'Return-Path: <c@example.edu>' 'Return-Path: <hop@example.edu>' \
        'Delivered-To: hop@example.org' '' x > "$box/8.h" # the second Return-Path belongs to the message
    run 0 "$ODMR" queue -q "$T/queue" -l
    sed -n 's/^      \(from\|to\) /\1 /p' "$T/out" > "$T/envelopes"
    same - "$T/envelopes" << 'END'
from <s@b.example>
to <x@other.example>
to <y@third.example>
from <a b@example.edu>
to <zoe@example.org>
to <"q, r"@example.org>
to <folded@example.org>
to <struck=example.org>
to <e\x1b[31mva>
from <a@example.edu>
to <z@other.example>
from <c@example.edu>
END
    equal "$(grep -c 'held: ' "$T/out")" 8
}

# If the user cannot read all of the queue, odmr queue names the missing parts and ends with exit code 75.
t_queue_that_is_not_ours() {
    needs_capabilities 'user who may not read the queue' SETUID
    put_letter one 1.a a@example.edu eva@example.org
    put_letter one 1.a a@example.edu eva@example.com
    chmod -R go+rX "$T"; chmod 600 "$T/queue/example.org/new/1.a"; chmod 700 "$T/queue/example.com/new"
    cp "$ODMR" "$T/odmr"
    chmod 444 "$T/queue/example.org/new/1.a"
    run 75 setpriv --reuid nobody --regid nogroup --clear-groups "$T/odmr" queue -q "$T/queue" -l
    has "$T/out" '^example.org  *1  .* 0$' # the file is opened for reading only
    chmod 600 "$T/queue/example.org/new/1.a"
    run 75 setpriv --reuid nobody --regid nogroup --clear-groups "$T/odmr" queue -q "$T/queue" -l
    has "$T/out" '^example.org  *0  *0  .* 1$'
    has "$T/out" '^      held: this user cannot open it$'
    has "$T/err" '^odmr: cannot read the queue of example.com: Permission denied; its mail waits$'
}

# A held message is never sent, changed or announced with 250, and odmr queue shows the reason.
t_held_mail() {
    local box=$T/queue/example.org/new before
    provider
    mkdir -p "$box/8.directory"
    printf 'Subject: no envelope\n\nx\n' > "$box/1.a"
    printf 'Return-Path: <a@b.example>\nDelivered-To: x@other.example\n\nx\n' > "$box/2.b"
    printf 'Delivered-To: x>y@example.org\n\nx\n' > "$box/3.c"
    printf 'Delivered-To: x\001y@example.org\n\nx\n' > "$box/4.d"
    printf 'Return-Path: <a b@example.edu>\nDelivered-To: x@example.org\n\nx\n' > "$box/5.e"
    ln -s /etc/passwd "$box/6.f"
    mkfifo "$box/7.g"
    printf 'Delivered-To: %02000d@example.org\n\nx\n' 1 > "$box/9.h"
    : > "$box/90.i"
    printf 'Delivered-To: x\0y@example.org\n\nx\n' > "$box/91.j"
    before=$(ls -lR --time-style=full-iso "$T/queue"; cat "$box"/[123459]* | cksum)
    login
    ask ATRN '^453 '
    equal "$(ls -lR --time-style=full-iso "$T/queue"; cat "$box"/[123459]* | cksum)" "$before"
    run 0 "$ODMR" queue -q "$T/queue" -l
    equal "$(grep -c 'held: ' "$T/out")" 11
    has "$T/out" '^example.org  *0  *0 .* 11$'
    has "$T/out" 'held: no recipient in its envelope'
    has "$T/out" 'held: its recipients belong to another domain'
    has "$T/out" 'held: not a regular file'
    put_letter one 92.k a@example.edu eva@example.org
    ask ATRN '^250 '
    take_mail
    equal "$N_GOT" 1
}

# If a recipient's address is not a mailbox, the message is sent to the other recipients. The bad address stays in the
# file, and the file is then held.
t_a_bad_recipient_beside_a_good_one() {
    provider
    put_letter one 1.a a@example.edu bad@@example.org eva@example.org $'\xff@example.org'
    turn
    until_true settled
    equal "$(sed '/^\r*$/,$d' "$T/got/1")" $'MAIL FROM:<a@example.edu>\nRCPT TO:<eva@example.org>'
    equal "$(owed 1.a)" $'bad@@example.org \xff@example.org'
    login; ask ATRN '^453 '
    has "$LOG" 'held example.org/new/1.a: a recipient in its envelope is not a mailbox$'
}

# odmr queue names each reason for which a message is held.
t_why_mail_is_held() {
    local box=$T/queue/example.org/new why
    mkdir -p "$box"
    printf 'Subject: x\n\nx\n' > "$box/1.no recipient in its envelope"
    printf 'Return-Path: <a@b.example>\n\nx\n' > "$box/2.no recipient in its envelope"
    printf 'Delivered-To: x@other.example\n\nx\n' > "$box/3.its recipients belong to another domain"
    printf 'Delivered-To: eva=example.org\nEnvelope-To: eva@example.org\n\nx\n' \
        > "$box/4.no recipient is left in its envelope: all are struck out"
    printf 'Delivered-To: eva@other.example, <bob@>\n\nx\n' > "$box/5.a recipient in its envelope is not a mailbox"
    printf 'Return-Path: a<b@example.edu\nDelivered-To: x@example.org\n\nx\n' \
        > "$box/6.its Return-Path is not a mailbox"
    printf 'Delivered-To: %01100d@example.org\n\nx\n' 1 > "$box/7.a line of its envelope is too long"
    printf 'Delivered-To: x@example.org\0\n\nx\n' > "$box/8.a NUL octet in its envelope"
    printf 'Delivered-To: "x\\\177y"@example.org\n\nx\n' > "$box/11.a recipient in its envelope is not a mailbox"
    printf 'Return-Path: <a@b"> c"d>\nDelivered-To: x@example.org\n\nx\n' > "$box/12.its Return-Path is not a mailbox"
    mkdir "$box/9.not a regular file"
    ln -s "1.no recipient in its envelope" "$box/10.not a regular file"
    provider
    login; ask ATRN '^453 '
    for why in "$box"/*; do
        why=${why##*/}
        has "$LOG" "held example.org/new/$why: ${why#*.}\$"
    done
    run 0 "$ODMR" queue -q "$T/queue" -l
    equal "$(grep -c '^      held: ' "$T/out")" 12
    equal "$(sed -n 's/^  [^ ].*  example.org.new.[0-9]*\.//p' "$T/out" | sort)" \
        "$(sed -n 's/^      held: //p' "$T/out" | sort)"
}

# Striking out a recipient changes one octet of the file and preserves its inode, size and time.
t_recipients_are_struck_out_in_place() {
    local file=$T/queue/example.org/new/1.a before
    provider
    put_letter one 1.a a@example.edu eva@example.org '"b@b"@example.org' Zoe@Example.ORG x@elsewhere.example
    touch -d '3 days ago' "$file"
    before=$(stat -c '%i %s %Y' "$file")
    ANSWERS=(['RCPT TO:<Zoe@Example.ORG>']='450 4.2.0 later'); turn
    equal "$(stat -c '%i %s %Y' "$file")" "$before"
    equal "$(cat "$file")" "$(echo 'Return-Path: <a@example.edu>'
        printf 'Delivered-To: %s\n' eva=example.org '"b@b"=example.org' Zoe@Example.ORG \
            x@elsewhere.example; letter one)"
    ANSWERS=(); turn
    equal "$(sed '/^\r*$/,$d' "$T/got/1")" $'MAIL FROM:<a@example.edu>\nRCPT TO:<Zoe@Example.ORG>' 'the second session'
    # one recipient is in a domain of another account, so the file stays and is held
    login; ask ATRN '^453 '
    has "$LOG" 'held example.org/new/1.a: its recipients belong to another domain$'
}

# Recipients are struck out even in a file whose times only its owner can set.
t_recipients_are_struck_out_in_a_file_of_another_user() {
    needs_capabilities 'second user' CHOWN SETUID
    put_letter one 1.a a@example.edu eva@example.org bob@example.org
    chmod 755 "$T"
    chown -R "nobody:$(id -g nobody)" "$T/queue"
    chown root "$T/queue/example.org/new/1.a"
    chmod 660 "$T/queue/example.org/new/1.a"
    provider --user nobody
    ANSWERS=(['RCPT TO:<bob@example.org>']='450 4.2.0 later'); turn
    until_true settled
    hasnt "$LOG" 'cannot strike out'
    equal "$(owed 1.a)" bob@example.org
}

# Recipients are struck out even on a full disk without a tmp directory.
t_recipients_are_struck_out_on_a_full_disk() {
    local root
    unshare -m true 2> /dev/null || skip 'CAP_SYS_ADMIN is missing, to mount a small disk'
    put_letter one 1.a a@example.edu eva@example.org bob@example.org
    rm -r "$T/queue/example.org/tmp"
    # shellcheck disable=SC2016
    AROUND=(unshare -m bash -c 'cp -a "$T/queue" "$T/full" && mount -t tmpfs -o size=64k none "$T/queue" &&
        cp -a "$T/full/." "$T/queue" &&
        { cat /dev/zero > "$T/queue/filler"; exec "$@"; }' -)
    provider
    root=/proc/$PROVIDER/root
    ! echo > "$root$T/queue/more" || fail 'the disk is not full'
    ANSWERS=(['RCPT TO:<bob@example.org>']='450 4.2.0 later')
    turn; turn
    equal "$N_GOT $(grep -hc '^RCPT' "$T/heard")" '0 1'
    equal "$(grep -h '^Delivered-To' "$root$T/queue/example.org/new/1.a" | xargs)" \
        'Delivered-To: eva=example.org Delivered-To: bob@example.org'
    ANSWERS=(); turn
    until_true settled
    equal "$N_GOT $(ls "$root$T/queue/example.org/new")" '1 '
}

# If a delivered message cannot be removed, it is not sent again, because its recipients are struck out and it is held.
# The next messages of that directory are not tried.
t_message_that_cannot_be_removed() {
    local box=$T/queue/example.org/new
    needs chattr
    mkdir -p "$box"
    {
        chattr +a "$box" && chattr -a "$box"
    } 2> /dev/null || skip 'CAP_LINUX_IMMUTABLE is missing, or the file system has no append-only directories'
    provider
    put_letter one 1.a a@example.edu eva@example.org
    put_letter two 2.a a@example.edu eva@example.org bob@example.org
    put_letter other 3.a a@example.edu eva@example.com
    chattr +a "$box"
    turn
    until_true settled
    chattr -a "$box"
    equal "$N_GOT $(cat "$T"/got/* | sed -n 's/^Subject: //p' | tr '\r\n' '  ')" '2 one  other  '
    equal "$(owed 1.a) / $(owed 2.a)" ' / eva@example.org bob@example.org'
    has "$LOG" \
        'cannot remove example.org/new/1.a (Operation not permitted): its recipients are struck out instead, and'
    chattr +a "$box"
    turn
    until_true settled
    chattr -a "$box"
    has "$LOG" 'held example.org/new/1.a: no recipient is left in its envelope: all are struck out$'
    equal "$N_GOT $(sed -n 's/^Subject: //p' "$T/got/1" | tr -d '\r')" '1 two'
}

# If a file is replaced or written into while it is sent, the new content stays in the queue, whatever the reply to the
# old content was.
t_what_is_removed_is_what_was_sent() {
    local file=$T/queue/example.org/new/1.a change what
    provider
    for change in 'letter new | put new a@example.edu bob@example.org; mv "${file%1.a}new" "$file"' \
        'echo more >> "$file"' \
        'printf X | dd bs=1 seek=90 conv=notrunc of="$file" status=none; touch -d "2 hours ago" "$file"' \
            'touch -d "1970-01-01" "$file"'
        do
        for what in '250 ok' '450 later'; do
            until_true settled
            put_letter one 1.a a@example.edu eva@example.org zoe@example.org
            touch -d '2 hours ago' "$file"
            at_ATRN
            dialogue <<END
P: MAIL *
C: 250 ok
P: RCPT TO:<eva*
C: 250 ok
P: RCPT TO:<zoe*
C: $what
P: DATA
C: 354 go on
P: (content)
END
            eval "$change"
            cp -p "$file" "$T/changed"
            dialogue <<'END'
C: 250 taken
P: QUIT
C: 221 bye
END
            until_true settled
            same "$T/changed" "$file" "$change"
            has "$LOG" 'example.org/new/1.a was replaced or changed while it was sent: message kept, it is sent again'
            : > "$LOG"
        done
    done
}

# If the message or its directory is gone when the message is delivered, nothing is removed and no error is logged.
t_message_that_is_gone_when_it_is_delivered() {
    local gone
    provider
    for gone in queue/example.org/new/1.a queue/example.org; do
        put_letter one 1.a a@example.edu eva@example.org
        at_ATRN
        dialogue <<'END'
P: MAIL *
C: 250 ok
P: RCPT *
C: 250 ok
P: DATA
C: 354 go on
P: (content)
END
        rm -r "${T:?}/$gone"
        dialogue <<'END'
C: 250 taken
P: QUIT
C: 221 bye
C: (closes)
END
        until_true settled
        hasnt "$LOG" 'cannot remove\|sent again\|stays'
    done
}

# A recipient that is set aside stays in .Undeliverable when another is set aside later.
t_setting_aside_twice() {
    provider
    put_letter one 1.a '' eva@example.org bob@example.org
    ANSWERS=(['RCPT TO:<eva@example.org>']='550 5.1.1 no' ['RCPT TO:<bob@example.org>']='450 later'); turn
    ANSWERS=(['RCPT TO:<bob@example.org>']='550 5.1.1 no'); turn
    equal "$(cat "$T/queue/example.org/.Undeliverable/new"/* | grep '^Delivered-To:' | sort | xargs)" \
        'Delivered-To: bob@example.org Delivered-To: eva@example.org'
    equal "$(find "$T/queue/example.org/new" -type f | wc -l)" 0
}

# If a copy for .Undeliverable cannot be written and synced, the message stays and the copy is removed.
# not with: SANITIZE, OVER_TLS
t_setting_aside_that_fails() {
    local call n
    run 0 make -s -C "$here" build/fail.so
    for call in fsync renameat mkdirat fflush openat; do
        for n in 1 2 3 4; do
            rm -rf "$T/queue" "$T/fired"
            mkdir -p "$T/queue/example.org/.Undeliverable"/{new,cur,tmp}
            put_letter one 1.a '' eva@example.org
            AROUND=(env FAIL=$call FAIL_AT=$n FAIL_ERRNO=EIO FAIL_FROM=mkdirat FAIL_LOG="$T/fired"
                LD_PRELOAD="$here/build/fail.so")
            [ $call != mkdirat ] || rm -r "$T/queue/example.org/.Undeliverable"
            provider
            AROUND=()
            ANSWERS=([CONTENT]='554 5.7.1 refused'); turn
            until_true settled
            kill -9 "$PROVIDER"; wait "$PROVIDER" 2> /dev/null
            if shows "$LOG" 'and cannot be moved to .Undeliverable; message kept'; then
                equal "$(owed 1.a) $(ls "$T/queue/example.org/.Undeliverable/new" 2> /dev/null)" 'eva@example.org ' \
                    "$call $n"
            elif shows "$LOG" 'has no sender to return it to: moved to .Undeliverable'; then
                equal "$(cat "$T/queue/example.org/.Undeliverable/new"/*)" \
                    "$(printf 'Return-Path: <>\nDelivered-To: eva@example.org\n'; letter one)" "$call $n"
            else
                equal "$(owed 1.a)" eva@example.org "$call $n"
            fi
            equal "$(unfinished)" 0 "$call $n: left in tmp"
        done
    done
    grep -qh 'cannot be moved to .Undeliverable' "$T"/provider*.log || fail 'no copy has failed'
}

# Mail older than --max-age is returned to its sender, held mail stays, and old files in tmp are removed.
t_ageing() {
    mkdir -p "$T/queue/example.org/.Undeliverable"/{new,cur,tmp}
    put_letter old 1000000000.M1.a sender@example.edu eva@example.org bob@example.org
    put_letter null 1000000001.M1.a '' eva@example.org
    put_letter held 1000000002.M1.a sender@example.edu not-a-mailbox@example.org
    sed -i 's/^Delivered-To:.*/Delivered-To: a b/' "$T/queue/example.org/new/1000000002.M1.a"
    put_letter young "$(date +%s).M1.a" sender@example.edu eva@example.org
    put_letter young "$(($(date +%s) - 86400 * 2)).M1.a" sender@example.edu eva@example.org
    letter 'no such time' | put 5.eml sender@example.edu eva@example.org
    letter 'no such time' | put 99999999999999999999999.x sender@example.edu eva@example.org
    touch "$T/queue/example.org/tmp/young" "$T/queue/example.org/tmp/old" "$T/queue/example.org/.Undeliverable/tmp/old"
    touch -d '37 hours ago' "$T/queue/example.org/tmp/old" "$T/queue/example.org/.Undeliverable/tmp/old"
    provider
    until_true counted 2 'unfinished for 36 hours$' "$LOG"
    equal "$(unfinished)" 1
    [ -e "$T/queue/example.org/tmp/young" ] || fail 'the young one has gone'
    equal "$(waiting) $(notices)" '7 0'
    stop_provider
    provider --max-age 3
    until_true counted 1 'moved to .Undeliverable' "$LOG"
    equal "$(notices)" 1
    has "$T/notice.1" '^Status: 4.4.7$'
    equal "$(sed -n 's/^Final-Recipient: rfc822; //p' "$T/notice.1" | xargs)" 'eva@example.org bob@example.org'
    equal "$(find "$T/queue/example.org/new" -type f | wc -l)" 5
    equal "$(find "$T/queue/example.org/.Undeliverable/new" -type f | wc -l)" 1
    run 64 "$ODMR" provider --max-age -1
    run 64 "$ODMR" provider --max-age x
    # the directory was changed before this start, so the clock is right although all mail is old
    rm -r "$T/queue"
    put_letter old 1000000000.M1.a sender@example.edu eva@example.org
    provider --max-age 3
    until_true eval '[ "$(waiting) $(notices)" = "0 2" ]'
}

# ---- The program: the log ----------------------------------------------------------------------------

# Every line of the provider's log starts with the local time and its offset, or with a priority if JOURNAL_STREAM
# names standard error, as systemd sets it.
t_log_lines_have_time_or_priority() {
    local log UNTRACED=yes
    export TZ=XYZ-5:30
    provider
    dial; expect '^220 '; hang_up
    until_true settled
    [ "$(grep -cvE '^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}\+05:30 odmr: ' "$LOG")" = 0 ] ||
        fail "a line without its time: $(cat "$LOG")"
    [ $(($(date +%s) - $(date -d "$(head -c 25 "$LOG")" +%s))) -lt 60 ] ||
        fail "the log is not of this minute: $(cat "$LOG")"
    log=$T/provider1.log
    : > "$log"
    JOURNAL_STREAM=$(stat -c %d:%i "$log") provider
    login
    ask 'ATRN elsewhere.example' '^450 '
    stop_provider
    has "$log" '^<5>odmr: listening on '
    has "$log" '^<6>odmr: \[1\] authenticated as '
    has "$log" '^<4>odmr: \[1\] ATRN answered 450'
    equal "$(grep -cv '^<[3-6]>odmr: ' "$log")" 0 'lines without a priority'
    JOURNAL_STREAM=$(stat -c %d:%i "$log") run 78 "$ODMR" provider -q "$T/none" -a "$T/accounts"
    matches "$T/err" "^$MOMENT odmr: cannot open the queue directory $T/none .--queue.: "
}

# The log has one line for each recipient's fate, with sender, Message-ID, file and reply.
t_the_log_tells_each_recipients_fate() {
    local where='from=<a@example.edu> message-id=<x.1@example.edu> file=example.org/new/1.a'
    provider
    printf 'Subject: x\nMessage-ID:\n\t<x.1@example.edu>\nReferences: <y@z>\n\nMessage-ID: <no@header>\n' |
        put 1.a a@example.edu eva@example.org bob@example.org zoe@example.org
    ANSWERS=(['RCPT TO:<bob@example.org>']=$'450-4.2.0 not\r\n450 4.2.0 now'
        ['RCPT TO:<zoe@example.org>']='550 5.1.1 no')
    turn
    until_true settled
    has "$LOG" "\\[1\\] delivered to=<eva@example.org> $where: 250 OK\$"
    has "$LOG" "\\[1\\] deferred to=<bob@example.org> $where: 450 4.2.0 not / 4.2.0 now\$"
    has "$LOG" "\\[1\\] refused to=<zoe@example.org> $where: 550 5.1.1 no\$"
    ANSWERS=([CONTENT]=CLOSE); turn
    until_true settled
    has "$LOG" "\\[2\\] deferred to=<bob@example.org> $where: the peer closed the connection\$"
    put_letter two 2.a '' eva@example.org
    ANSWERS=(['RCPT TO:<bob@example.org>']='450 later'); turn
    until_true settled
    has "$LOG" '\[3\] delivered to=<eva@example.org> from=<> message-id=none file=example.org/new/2.a: 250 OK$'
}

# If the customer's summary cannot name all domains, it shows that there are more.
t_the_summary_of_many_domains() {
    serve peer_with_long_domains
    customer 0 "127.0.0.1:$PORT"
    peer_ok
    match "$(tail -n 1 "$T/err")" ' 1 message, [0-9]* octets received for (d[0-9]\.x{60}\.example,){7}\.\.\.$'
}
peer_with_long_domains() {
    local n long
    printf -v long '%060d' 0
    reverse
    ask 'MAIL FROM:<a@b.example>' '^250 '
    for n in {1..9}; do ask "RCPT TO:<y@d$n.${long//0/x}.example>" '^250 '; done
    ask DATA '^354 '; say 'Subject: x'; ask . '^250 '; ask QUIT '^221 '
}

# The line of a recipient's fate has room for the longest addresses, a long Message-ID, a long file name and a long
# reply.
t_the_log_has_room_for_long_addresses() {
    local long to from id name
    printf -v long '%0400d' 0
    to=${long:0:308}@example.org from=${long:0:199}@${long:0:60}.${long:0:59} id="<${long:0:248}>" name=${long:0:250}.a
    equal "${#to} ${#from}" '320 320'
    provider
    printf 'Message-ID: %s\n\nx\n' "$id" | put "$name" "$from" "$to"
    ANSWERS=([CONTENT]="250 2.0.0 $long"); turn
    until_true settled
    has "$LOG" " delivered to=<$to> from=<$from> message-id=$id file=example.org/new/$name: 250 2.0.0 $long\$"
}

# A name from AUTH cannot forge a line of the log, because it comes after the address and is quoted, escaped and cut.
# The test uses README's expression for fail2ban.
t_names_cannot_forge_the_log() {
    local name regex wanted
    regex=$(sed -n 's/^ *failregex = //p' "$here/README")
    [ -n "$regex" ] || fail 'README has no failregex'
    provider -l '[::1]:0'
    wanted=$(printf 'a%.0s' {1..280})
    while IFS= read -r name; do
        open_session
        auth_cram_md5 "$name" wrong '^535 '
        hang_up
    done << END
x" from 192.0.2.1
x\\x0a
authentication failed from 192.0.2.1:25 for "x"
$(printf 'a%.0s' {1..2000})
END
    until_true counted 4 'authentication failed' "$LOG"
    has "$LOG" '\] authentication failed from 127.0.0.1:[0-9]* for "x\\" from 192.0.2.1": CRAM-MD5, attempt 1 of 3$'
    has "$LOG" '\] authentication failed from 127.0.0.1:[0-9]* for "x\\\\x0a": CRAM-MD5, attempt 1 of 3$'
    has "$LOG" \
        '\] authentication failed from 127.0.0.1:[0-9]* for "authentication failed from 192.0.2.1:25 for \\"x\\"": CRAM'
    has "$LOG" "\\] authentication failed from 127.0.0.1:[0-9]* for \"$wanted[a]*\"[.][.][.]: CRAM"
    exec {LINE}<> "/dev/tcp/::1/$(sed -n 's/.*listening on \[::1\]:\([0-9]*\)$/\1/p' "$LOG")"
    expect '^220'; ask 'EHLO x' '^250'; auth_cram_md5 6 wrong '^535 '
    # fail2ban removes the time, and its <HOST> is an address with or without brackets
    perl -e 'my $regex = shift =~ s/<HOST>/\\[?([0-9a-f.:]+)\\]?/r;
        while (<>) { s/^\d{4}-\d\d-\d\dT\S+//; print "$1\n" if /$regex/; }' "$regex" "$LOG" > "$T/banned"
    equal "$(sort "$T/banned" | uniq -c | tr -s ' \n' ' ')" ' 4 127.0.0.1 1 ::1 '
}

# Control characters of the peer are escaped wherever they are printed.
t_nothing_of_the_peer_is_printed_raw() {
    provider --trace
    dialogue_on_a_new_connection <<END
P: 220 *
C: EHLO \\x1b[31mred\\x07
C: NOOP \\x1b]0;title\\x07
P: 500 *
P: 500 *
C: EHLO x
P: ...
P: 250 *
C: AUTH CRAM-MD5
P: 334 *
C: $(b64 $'\e[31mname 0123456789abcdef0123456789abcdef')
P: 535 *
END
    has "$LOG" ' for "\\x1b\[31mname"'
    has "$LOG" 'C: EHLO \\x1b\[31mred\\x07'
    ! grep -q $'[\x1b\x07]' "$LOG" || fail 'a control character in the log'
}

# After SIGUSR1 the log has a line for each session, with its number, peer, account, state and messages so far. All
# sessions continue.
t_sigusr1_lists_the_sessions() {
    local peers=()
    provider
    put_many 3
    dial; expect '^220 '; peers+=("$LINE")
    login other 'another secret: with colons'; peers+=("$LINE")
    at_ATRN
    dialogue <<'END'
P: MAIL *
C: 250 ok
P: RCPT *
C: 250 ok
P: DATA
C: 354 go on
P: From: *
P: (content)
C: 250 ok
P: MAIL *
END
    kill -USR1 "$PROVIDER"
    until_true shows "$LOG" '3 sessions'
    until_true counted 1 '\[1\] 127\.0\.0\.1:[0-9]+, no account yet, initial state, 0 messages so far$' "$LOG"
    until_true counted 1 '\[2\] 127\.0\.0\.1:[0-9]+, account other, authenticated state, 0 messages so far$' "$LOG"
    until_true counted 1 '\[3\] 127\.0\.0\.1:[0-9]+, account example\.org, reversed state, 1 message so far$' "$LOG"
    hang_up # otherwise the provider waits for this customer's reply
    LINE=${peers[1]}; ask ATRN '^453 '
    stop_provider
}

# SIGUSR1 can arrive at any moment of any session without harm.
t_sigusr1_while_sessions_come_and_go() {
    provider
    put_many 60
    ( while kill -USR1 "$PROVIDER" 2> /dev/null; do moment; done ) & STARTED+=($!)
    for _ in 1 2 3 4; do customer 0 "127.0.0.1:$PORT"; put_many 60; done
    until_true shows "$LOG" 'reversed state'
    stop_provider
}

# A flood of refused connections causes two lines in the log every few seconds, for the first and for the number of the
# others.
t_refused_connections_are_counted() {
    local i OVER_TLS= # over TLS a refused connection gets no reply
    provider --allow 192.0.2.1
    for i in {1..50}; do dial; expect '^554 '; closed; hang_up; done
    until_true shows "$LOG" '49 more connections were refused'
    equal "$(grep -c 'refused' "$LOG")" 2
    dial; expect '^554 '; dial; expect '^554 '
    stop_provider
    equal "$(grep -c 'refused: 554 example.net does not serve your address$' "$LOG")" 2
    has "$LOG" ': 1 more connection was refused$'
}

# At the start the log says if there is no account, and if a certificate has expired or soon will.
t_start_says_what_will_surprise() {
    local days
    needs faketime
    authority; mkdir "$T/queue"
    printf '# nobody yet\n' > "$T/accounts"; chmod 600 "$T/accounts"
    provider
    has "$LOG" "$T/accounts (--accounts) has no account: nobody can log in$"
    accounts
    for days in 30 12 3; do
        faketime "-2 days" openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days "$days" \
            -subj /CN=x -keyout "$T/k" -out "$T/c$days" 2> /dev/null
        cat "$T/k" >> "$T/c$days"
    done
    faketime '-9 days' openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3 -subj /CN=x \
        -keyout "$T/old" -out "$T/old.crt" 2> /dev/null
    cat "$T/old" >> "$T/old.crt"
    provider --cert "$T/c30"; hasnt "$LOG" 'expire'; hasnt "$LOG" 'no account'
    cp "$T/old.crt" "$T/c30"; kill -HUP "$PROVIDER"; until_true shows "$LOG" 'the certificate has expired'
    provider --cert "$T/c12"; has "$LOG" "--cert $T/c12: the certificate expires in \(9\|10\) days; renew it"
    provider --cert "$T/c3"; has "$LOG" "--cert $T/c3: the certificate expires in \(0 days\|1 day\); renew it"
    provider --cert "$T/old.crt"; has "$LOG" "--cert $T/old.crt: the certificate has expired"
}

# ---- The program: services ---------------------------------------------------------------------------

# The log names each socket with its port. If a socket cannot be opened, the start fails.
# not with: OVER_TLS
t_listening_sockets() {
    provider -l '[::1]:0' -l localhost:0
    until_true shows "$LOG" '\[::1\]'
    [ "$(grep -cE "^$MOMENT odmr: listening on 127.0.0.1:[1-9][0-9]*\$" "$LOG")" = 2 ] ||
        fail 'two sockets on 127.0.0.1 were asked for'
    customer 1 "[::1]:$(sed -n 's/.*listening on \[::1\]:\([0-9]*\)$/\1/p' "$LOG" | head -n 1)"
    customer 1 "localhost:$PORT"
    run 71 "$ODMR" provider -l "127.0.0.1:$PORT" -q "$T/queue" -a "$T/accounts"
    matches "$T/err" "^$MOMENT odmr: 127.0.0.1:$PORT: cannot listen: [^
]*\$"
    run 68 "$ODMR" provider -l nonexistent.invalid:0 -q "$T/queue" -a "$T/accounts"
}

# If a socket cannot be had, or there are too many, the message says why.
# not with: SANITIZE, OVER_TLS
t_sockets_that_cannot_be_had() {
    make -s -C "$here" build/fail.so || fail 'not built'
    mkdir "$T/queue"; accounts
    fault socket 1 EAFNOSUPPORT socket
    run 71 timeout 10 "${FAULT[@]}" "$ODMR" provider -l 127.0.0.1:0 -q "$T/queue" -a "$T/accounts"
    matches "$T/err" 'odmr: 127.0.0.1:0: cannot listen: Address family not supported by protocol$'
    provider
    fault socket 1 EMFILE socket
    ODMR_SECRET=x run 75 "${FAULT[@]}" "$ODMR" customer -u x "127.0.0.1:$PORT"
    matches "$T/err" "odmr: 127.0.0.1:$PORT: Too many open files\$"
    needs_namespaces -n 'a network in which every address is free'
    # shellcheck disable=SC2046
    run 64 timeout 10 unshare -n "$ODMR" provider $(printf ' -l *:%s' {4001..4017}) -q "$T/queue" -a "$T/accounts"
    matches "$T/err" 'odmr: \*:4017: cannot listen: more than 32 sockets$'
}

# Standard streams that are closed at the start do not become connections, and output to them fails.
t_standard_streams_that_are_closed() {
    local fd OVER_TLS=
    provider
    stop_provider
    "$ODMR" provider -l "127.0.0.1:$PORT" -q "$T/queue" -a "$T/accounts" -n example.net --trace 0<&- 1>&- 2>&- &
    PROVIDER=$!
    STARTED+=("$PROVIDER")
    until_true reachable "$PORT"
    for fd in 0 1 2; do equal "$(readlink "/proc/$PROVIDER/fd/$fd")" /dev/null "descriptor $fd"; done
    login; ask ATRN '^453 '; ask QUIT '^221 '; closed
    stop_provider
    run 74 bash -c '"$1" --version >&-' - "$ODMR"
    run 75 bash -c '"$1" enqueue -q "$2/queue" eva@example.org <&-' - "$ODMR" "$T"
    equal "$(waiting)" 0
}

# Programs that odmr starts inherit only their standard streams, also when a lost receiver is started again.
t_programs_inherit_nothing() {
    local inherited="for fd in /proc/self/fd/*; do case \$fd in */[0-2]) ;; *) readlink \$fd ;; esac; done"
    printf '#!/bin/sh\n{ echo ran; %s; } > %s\n' "$inherited" "$T/descriptors" > "$T/sendmail"; chmod 755 "$T/sendmail"
    provider
    put_letter one 1.a sender@example.edu eva@example.org
    ANSWERS=([RCPT]='550 no'); turn
    until_true settled
    has "$T/descriptors" ran
    hasnt "$T/descriptors" 'socket:\|(deleted)\|/new\|/1\.a'
    put_letter two 2.a sender@example.edu eva@example.org
    ODMR_SECRET=tanstaaf run 75 "$ODMR" customer -u example.org "127.0.0.1:$PORT" \
        --exec "if mkdir $T/once; then echo 220 me; else { echo again; $inherited; } > $T/descriptors; fi"
    has "$T/descriptors" again
    hasnt "$T/descriptors" 'socket:'
}

# Signals that the parent process ignored or blocked work as usual, and programs that odmr starts have SIGPIPE, SIGCHLD
# and SIGXFSZ at their defaults.
t_signals_of_the_parent_process() {
    local ignored
    AROUND=(perl -MPOSIX=:signal_h -e '$SIG{CHLD} = "IGNORE"; $SIG{TERM} = "IGNORE";
        sigprocmask(SIG_BLOCK, POSIX::SigSet->new(SIGTERM, SIGHUP, SIGCHLD)); exec @ARGV or die')
    printf '#!/bin/sh\ngrep -E "^Sig(Blk|Ign)" /proc/self/status > "%s/signals"; exec cat > "%s/notice.$$"\n' "$T" \
        "$T" > "$T/sendmail"
    chmod 755 "$T/sendmail"
    provider
    put_letter one 1.a a@example.edu eva@example.org
    ANSWERS=([RCPT]='550 5.1.1 no such user')
    turn
    until_true settled
    equal "$(waiting) $(how_many '"$T"/notice.*')" '0 1' 'waiting, notices'
    hasnt "$LOG" '^.* failure notice for .* not accepted: .*; message kept$'
    equal "$(sed -n 's/^SigBlk:\t//p' "$T/signals")" 0000000000000000 'blocked in the program that is run'
    ignored=$((16#$(sed -n 's/^SigIgn:\t//p' "$T/signals")))
    equal $((ignored & (1 << 12 | 1 << 14 | 1 << 16 | 1 << 24))) 0 'SIGPIPE, SIGTERM, SIGCHLD, SIGXFSZ ignored in it'
    kill -HUP "$PROVIDER"; until_true shows "$LOG" 'read again'
    put_letter two 2.a a@example.edu eva@example.org
    "${AROUND[@]}" "$BASH" -c 'exec "$@" < /dev/null' - env ODMR_SECRET=tanstaaf "$ODMR" customer -u example.org \
        --quiet \
        --exec "grep -E '^SigIgn' /proc/self/status > '$T/signals'; echo 220 x; read -r line" "127.0.0.1:$PORT" \
        2> "$T/err"
    ignored=$((16#$(sed -n 's/^SigIgn:\t//p' "$T/signals")))
    equal $((ignored & (1 << 12 | 1 << 14 | 1 << 16 | 1 << 24))) 0 "ignored in --exec's program"
    stop_provider
}

# After --user the process cannot become root again or open files that only root can read.
t_user_drops_privileges() {
    local uid gid
    needs_capabilities 'privilege to drop' CHOWN SETUID
    uid=$(id -u nobody) gid=$(id -g nobody)
    chmod 755 "$T"
    mkdir -m 755 "$T/queue"
    provider --user nobody
    equal "$(sed -n 's/^Uid:\t//p' "/proc/$PROVIDER/status")" "$uid	$uid	$uid	$uid"
    equal "$(sed -n 's/^Gid:\t//p' "/proc/$PROVIDER/status")" "$gid	$gid	$gid	$gid"
    equal "$(sed -n 's/^Groups:\t//p' "/proc/$PROVIDER/status" | tr -d ' ')" "$gid"
    equal "$(sed -n 's/^CapEff:\t//p' "/proc/$PROVIDER/status")" 0000000000000000
    chown root "$T/accounts"
    kill -HUP "$PROVIDER"
    until_true shows "$LOG" 'reload failed: .*Permission denied.*stay in use'
    login; ask ATRN '^453 '
    run 67 "$ODMR" provider -l 127.0.0.1:0 -q "$T/queue" -a "$T/accounts" --user nobody-of-that-name
    chmod 755 "$T/queue"; chown nobody "$T/accounts"; cp "$ODMR" "$T/odmr"
    run 77 setpriv --reuid nobody --regid "$gid" --clear-groups "$T/odmr" provider -l 127.0.0.1:0 -q "$T/queue" \
        -a "$T/accounts" --user root
}

# If dropping the privileges has no effect, the provider does not start.
t_user_who_keeps_privileges() {
    mkdir "$T/queue"; accounts
    printf '%s\n' 'int initgroups(const char *u, int g) { return 0; }' 'int setgid(int g) { return 0; }' \
        'int setuid(int u) { return 0; }' |
        cc -w -shared -fPIC -o "$T/kept.so" -xc - || fail 'not built'
    run 70 env LD_PRELOAD="$T/kept.so" ASAN_OPTIONS=verify_asan_link_order=0 timeout 10 "$ODMR" provider \
        -l 127.0.0.1:0 \
        -q "$T/queue" -a "$T/accounts" --user nobody
    has "$T/err" '--user nobody: the privileges did not go away$'
}

# At the start the provider tests, as the user of --user, if it can read the accounts, the key, the certificate and each
# domain of the queue, and names those that it cannot read.
t_user_can_read_what_it_needs() {
    needs_capabilities 'another user' CHOWN SETUID
    local path
    chmod 755 "$T"
    authority
    mkdir -p "$T/queue"/example.{org,com}/{new,cur,tmp}; accounts
    openssl pkey -in "$T/server.pem" -out "$T/other.key"; cp "$T/ca.crt" "$T/client.crt"
    chown -R nobody "$T/queue" "$T/accounts" "$T/server.crt" "$T/other.key" "$T/client.crt"
    chmod 600 "$T"/*.key "$T"/{client,server}.crt
    for path in accounts server.crt other.key client.crt queue queue/example.com \
        queue/example.{org/cur,com/new,org/tmp}; do
        chown root "$T/$path"; [ ! -d "$T/$path" ] || chmod 700 "$T/$path"
        run 78 "$ODMR" provider --user nobody -l 127.0.0.1:0 -q "$T/queue" -a "$T/accounts" --cert "$T/server.crt" \
            --key "$T/other.key" --client-ca "$T/client.crt"
        matches "$T/err" "^$MOMENT odmr: (--[a-z-]+ )?$T/$path: --user nobody may not .*; do: chown (-R )?nobody $T/"
        equal "$(wc -l < "$T/err")" 1 'lines that say why'
        chown nobody "$T/$path"
    done
    provider --user nobody --cert "$T/server.crt" --key "$T/other.key" --client-ca "$T/client.crt"
    kill -HUP "$PROVIDER"; until_true shows "$LOG" 'certificates too'
}

# After SIGHUP the provider uses the new accounts, or the old accounts if the file has an error.
t_sighup_reads_accounts_again() {
    provider
    printf 'example.org:example.org:new secret\n' > "$T/accounts"
    kill -HUP "$PROVIDER"
    until_true shows "$LOG" 'accounts read again: 1'
    login example.org 'new secret'
    has "$LOG" 'authenticated as example.org (CRAM-MD5, \(in the clear\|TLSv1.3 TLS_AES_256_GCM_SHA384\))$'
    printf 'nonsense\n' > "$T/accounts"
    kill -HUP "$PROVIDER"
    until_true shows "$LOG" 'reload failed: .*accounts:1: .*stay in use'
    login example.org 'new secret'
}

# If SIGHUP removes an account or a domain, or changes a secret, open sessions apply this to AUTH, in the middle of an
# exchange, and to ATRN (RFC 2645, 5.2.1).
t_sighup_takes_accounts_away() {
    local connected asked logged_in
    put_letter one 1.a a@example.edu eva@example.org
    provider
    reads() {
        ( umask 77; echo "$1" > "$T/accounts" ); : > "$LOG"
        kill -HUP "$PROVIDER"; until_true shows "$LOG" 'accounts read again: 1'
    }
    login; ask 'ATRN example.com' '^453 '; logged_in=$LINE
    open_session; connected=$LINE
    open_session; ask 'AUTH CRAM-MD5' '^334 '; asked=$LINE
    cram_response example.org tanstaaf "${ANSWER#334 }"
    reads 'example.org:example.org:another secret'
    ask "$RESPONSE" '^535 '
    LINE=$connected; auth_cram_md5 example.org tanstaaf '^535 '
    LINE=$logged_in
    dialogue <<'END'
C: ATRN nonsense
P: 501 *
C: ATRN
P: 530 *
C: ATRN
P: 530 *
END
    has "$LOG" 'ATRN answered 530: account example.org was removed or its secret has changed$'
    reads 'other:other.example:tanstaaf'
    ask ATRN '^530 '
    reads 'example.org:example.com,example.net:tanstaaf'
    dialogue <<'END'
C: ATRN example.org
P: 450 *
C: ATRN example.net
P: 453 *
C: ATRN
P: 453 *
END
    reads 'example.org:example.org:tanstaaf'
    LINE=$connected; auth_cram_md5 example.org tanstaaf '^235 '
    ask ATRN '^250 '
    LINE=$asked; ask QUIT '^221 '
}

# If SIGHUP finds an accounts file that the start would refuse, the old accounts stay in use.
t_sighup_keeps_what_works() {
    provider
    login
    ask 'ATRN example.com' '^453 '
    chmod 644 "$T/accounts"; kill -HUP "$PROVIDER"
    until_true shows "$LOG" 'reload failed: .*chmod 600 .*stay in use'
    rm "$T/accounts"; kill -HUP "$PROVIDER"
    until_true shows "$LOG" 'reload failed: .*No such file.*stay in use'
    ( umask 77; echo 'other:other.example:x' > "$T/accounts" ); kill -HUP "$PROVIDER"
    until_true shows "$LOG" 'accounts read again: 1'
    open_session; auth_cram_md5 example.org tanstaaf '^535 '
}

# The provider and its threads keep running after any number of SIGHUPs at any moment.
t_a_storm_of_sighups() {
    local i threads storm=()
    provider
    poll_for_nothing
    threads=$(ls "/proc/$PROVIDER/task" | wc -l)
    for i in 1 2; do
        ( SECONDS=0; while [ "$SECONDS" -lt 2 ]; do kill -HUP "$PROVIDER"; done ) & storm+=($!)
    done
    wait "${storm[@]}"
    until_true shows "$LOG" 'accounts read again'
    poll_for_nothing
    equal "$(ls "/proc/$PROVIDER/task" | wc -l)" "$threads"
    stop_provider
}
poll_for_nothing() { login; ask ATRN '^453 '; ask QUIT '^221 '; closed; hang_up; until_true settled; }

# The provider handles signals also while connections wait that it cannot accept, because it has too many open files.
t_signals_are_heard_when_connections_wait() {
    local i
    AROUND=(bash -c 'ulimit -n 20; exec "$@"' -)
    provider
    for i in {1..30}; do dial; done
    until_true shows "$LOG" 'cannot accept a connection: Too many open files'
    kill -USR1 "$PROVIDER"
    until_true shows "$LOG" '[0-9] sessions'
    kill -HUP "$PROVIDER"
    until_true shows "$LOG" 'Too many open files; the old accounts and certificates stay in use'
    stop_provider
}

# After SIGTERM waiting sessions end with 421, and the listening socket is closed.
t_sigterm_while_waiting() {
    local first
    provider
    dial; expect '^220'; first=$LINE
    login
    kill -TERM "$PROVIDER"
    expect '^421 '; closed
    LINE=$first; expect '^421 '; closed
    wait "$PROVIDER"
    equal $? 0
    ! (dial "${TLS_PORT:-$PORT}") 2> /dev/null || fail 'still listening'
}

# A provider that stops does not wait, after 421 or QUIT, for a customer to close its end of the connection. The machine
# may be slow, so one of three attempts is enough.
t_sigterm_waits_for_no_close() {
    unset OVER_TLS # the tunnel would close
    local attempt start reversed
    put_letter one 1.a a@example.edu eva@example.org
    for attempt in 1 2 3; do
        provider
        at_ATRN; expect '^MAIL'; reversed=$LINE
        dial; expect '^220'
        start=${EPOCHREALTIME//[!0-9]/}
        kill -TERM "$PROVIDER"
        expect '^421 '
        LINE=$reversed
        dialogue <<'END'
C: 450 later
P: QUIT
C: 221 bye
END
        wait "$PROVIDER"
        [ $((${EPOCHREALTIME//[!0-9]/} - start)) -ge 950000 ] || return 0
    done
    fail 'it took a second or more each time'
}

# After SIGTERM the message under way is completed, QUIT is sent and the rest stays queued.
t_sigterm_while_sending() {
    local got
    provider
    put_many 500
    login
    ask ATRN '^250 '
    ( until_true [ -e "$T/got/3" ]; kill -TERM "$PROVIDER" ) &
    take_mail
    wait "$PROVIDER" || { cat "$LOG" >&2; fail 'it has not ended well'; }
    equal "$(tail -n 1 "$T/heard")" QUIT
    got=$N_GOT
    [ "$got" -lt 500 ] || fail 'all 500 were sent'
    equal "$(waiting)" $((500 - got))
}

# If the last session ends during the shutdown, the process waits until the session's thread has finished. The address
# sanitizer detects a thread that has not.
t_sigterm_as_a_session_ends() {
    local i
    put_letter one 1.a a@example.edu eva@example.org
    for i in {1..10}; do
        provider
        login
        ANSWERS=([CONTENT]='451 later')
        ask ATRN '^250 '
        take_mail
        kill -TERM "$PROVIDER"
        wait "$PROVIDER" || { cat "$LOG" >&2; fail 'it has not ended well'; }
        hang_up
    done
}

# A second SIGTERM ends the provider at once, and the mail stays.
t_second_signal_ends_at_once() {
    provider
    put_letter one 1 a@example.edu eva@example.org
    login; ask ATRN '^250 '
    kill -TERM "$PROVIDER"
    until_true shows "$LOG" 'stopping'
    kill -TERM "$PROVIDER"
    wait "$PROVIDER"
    equal $? 143
    equal "$(waiting)" 1
}

# A second SIGINT ends the provider at once, and the mail stays.
t_sigint_twice_ends_at_once() {
    provider
    put_letter one 1.a a@example.edu eva@example.org
    login; ask ATRN '^250 '
    kill -INT "$PROVIDER"
    until_true shows "$LOG" 'stopping; 1 '
    kill -INT "$PROVIDER"
    wait "$PROVIDER"
    equal $? 130
    equal "$(waiting)" 1
}

# ---- The program: the accounts -----------------------------------------------------------------------

# If the accounts file has an error, or others can read it, the start fails with exit code 78 and the line number.
t_accounts_file() {
    local bad key=AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=
    mkdir "$T/queue"
    for bad in 'no colons' 'name:example.org' ':example.org:x' 'a:org:x' 'a:example.org, example.com:x' \
        'a:example.org:' \
        $'a:example.org:x\na:example.com:y' 'a:../x.org:y' "a:example.org:{SCRAM-SHA-256} 4096,MDEy,$key,$key" \
        "a:example.org:{SCRAM-SHA-256}+4096,MDEy,$key,$key"; do
        printf '# first\n%s\n' "$bad" > "$T/accounts"
        chmod 600 "$T/accounts"
        run 78 "$ODMR" provider -l 127.0.0.1:0 -q "$T/queue" -a "$T/accounts"
        matches "$T/err" "^$MOMENT odmr: $T/accounts:[23]: [^
]*\$"
    done
    run 78 "$ODMR" provider --listen 127.0.0.1:0 --queue "$T/queue" --accounts "$T/none"
    accounts
    run 78 "$ODMR" provider -l 127.0.0.1:0 -q "$T/no queue" -a "$T/accounts"
    for bad in 640 604; do
        chmod "$bad" "$T/accounts"
        run 78 "$ODMR" provider -l 127.0.0.1:0 -q "$T/queue" -a "$T/accounts"
        has "$T/err" 'chmod 600'
    done
    ln -s "$T/accounts" "$T/link"
    run 78 "$ODMR" provider -l 127.0.0.1:0 -q "$T/queue" -a "$T/link"
    mkfifo -m 600 "$T/fifo"
    run 78 "$ODMR" provider -l 127.0.0.1:0 -q "$T/queue" -a "$T/fifo"
    run 78 "$ODMR" provider -l 127.0.0.1:0 -q "$T/queue" -a "$T/queue"
    run 78 "$ODMR" provider -l 127.0.0.1:0 -q "$T/accounts" -a "$T/accounts"
    printf 'a:example.org:x\0y\n' > "$T/accounts"; chmod 600 "$T/accounts"
    run 78 "$ODMR" provider -l 127.0.0.1:0 -q "$T/queue" -a "$T/accounts"
    for bad in other:other.example:se '# a com' $'\r'; do # the file is cut off in the middle
        printf 'a:example.org:x\n%s' "$bad" > "$T/accounts"
        run 78 "$ODMR" provider -l 127.0.0.1:0 -q "$T/queue" -a "$T/accounts"
        has "$T/err" 'accounts:2: the line has no end'
    done
    printf '# only\r\n\r\nexample.org:EXAMPLE.org:tanstaaf\r\n' > "$T/accounts"
    provider
    login
    ask 'ATRN example.org' '^453 '
}

# An accounts file that has a byte order mark or other line ends, or is a link, is refused with the reason. At SIGHUP an
# empty file does not replace the accounts.
t_accounts_that_an_editor_left() {
    mkdir "$T/queue"
    refused() {
        chmod 600 "$T/accounts"
        run 78 timeout "$PATIENCE" "$ODMR" provider -l 127.0.0.1:0 -q "$T/queue" -a "${2:-$T/accounts}"
        has "$T/err" "$1"
    }
    printf '\xef\xbb\xbfexample.org:example.org:tanstaaf\n' > "$T/accounts"
    refused "accounts:1: a byte order mark in front"
    printf '\xef\xbb\xbf# comment\nexample.org:example.org:tanstaaf\n' > "$T/accounts"
    refused "accounts:1: a byte order mark in front"
    printf '# comment\rexample.org:example.org:tanstaaf\r\n' > "$T/accounts"
    refused 'accounts:1: a CR in it that ends no line'
    printf '# comment\nexample.org:example.org:tan\rstaaf\n' > "$T/accounts"
    refused 'accounts:2: a CR in it that ends no line'
    printf '\nexample.org:example.org:tanstaaf\r\r\n' > "$T/accounts"
    refused 'accounts:2: a CR in it that ends no line'
    ln -s accounts "$T/link"; refused 'link (--accounts): it is a symbolic link; name the file itself$' "$T/link"
    printf '\r\n\n# \r\nexample.org:example.org:tanstaaf\r\n' > "$T/accounts"
    provider
    : > "$T/accounts"
    kill -HUP "$PROVIDER"
    until_true shows "$LOG" "accounts .--accounts. has no account; the old accounts and certificates stay in use"
    login
    printf 'example.org:example.org:other\n' > "$T/accounts"
    kill -HUP "$PROVIDER"; until_true shows "$LOG" 'accounts read again: 1'
    login example.org other
}

# If memory runs out while accounts are read, the provider reports an error and loses no account.
# not with: SANITIZE, OVER_TLS
t_accounts_and_a_lack_of_memory() {
    local kb code=0 tried=0
    mkdir "$T/queue"; accounts
    { printf '# '; head -c 30000000 /dev/zero | tr '\0' x; printf '\nlast:example.org:x\n'; } >> "$T/accounts"
    for kb in 20000 30000 40000; do
        code=0
        (ulimit -v "$kb"; exec timeout 3 "$ODMR" provider -l 127.0.0.1:0 -q "$T/queue" -a "$T/accounts") 2> "$T/err" ||
            code=$?
        [ "$code" != 78 ] || { tried=1; has "$T/err" 'accounts:3: cannot be read to its end'; }
    done
    equal "$tried" 1 'a lack of memory in the middle of the file'
}

# An account of 40,000 domains is read in the time of a sort, because no connection is greeted meanwhile.
t_account_of_many_domains_is_read_fast() {
    local n tenth MS=0 READ_AGAIN=0
    provider --trace
    for n in 4000 40000; do
        tenth=$MS
        ( umask 077
          { printf 'example.org:'; seq -f 'Domain%.0f.example,' "$n" | tr -d '\n'
            seq -f 'domain%.0f.EXAMPLE,' "$n" | tr -d '\n'
            echo 'first.example,example.org,First.Example:tanstaaf'; } > "$T/accounts" )
        read_accounts_thrice
    done
    # Sorting ten times the domains takes about fifteen times as long, and the limit is forty times. Comparing each with
    # each would take a hundred times as long.
    [ "$MS" -lt 3000 ] || [ "$MS" -lt $((40 * tenth)) ] ||
        fail "the accounts are read slowly: $MS ms, $tenth ms for a tenth of them"
    login
    ask 'ATRN domain40000.example,FIRST.example,domain1.example,first.example,domain1.example' '^453 '
    has "$LOG" 'ATRN domain40000.example,first.example,domain1.example answered 453'
}
# read_accounts_thrice: sets MS to the milliseconds that three readings take.
read_accounts_thrice() {
    local i start
    start=$(date +%s%N)
    for i in 1 2 3; do
        kill -HUP "$PROVIDER"; READ_AGAIN=$((READ_AGAIN + 1))
        until_true counted "$READ_AGAIN" 'accounts read again' "$LOG"
    done
    MS=$((($(date +%s%N) - start) / 1000000))
}

# odmr account prints a line for the accounts file, with the secret or a verifier, and asks for the secret without
# echo.
# not with: OVER_TLS
t_account() {
    printf 'a secret: with, everything\n' | run 0 "$ODMR" account me example.org,example.com
    equal "$(cat "$T/out")" 'me:example.org,example.com:a secret: with, everything'
    echo s3cret | run 0 "$ODMR" account --scram me example.org
    matches "$T/out" '^me:example.org:\{SCRAM-SHA-256\}4096,[A-Za-z0-9+/]{22}==,[A-Za-z0-9+/]{43}=,[A-Za-z0-9+/]{43}=$'
    run 64 "$ODMR" account; run 64 "$ODMR" account me; run 64 "$ODMR" account me org
    run 64 "$ODMR" account a:b example.org
    run 64 "$ODMR" account '#me' example.org; run 64 "$ODMR" account '' example.org
    run 64 "$ODMR" account me example.org x
    run 65 "$ODMR" account me example.org
    echo '{SCRAM-SHA-256}x' | run 65 "$ODMR" account me example.org
    needs unbuffer # its package has expect(1); "expect" is our function here
    env expect > "$T/tty" 2>&1 <<END
set timeout $PATIENCE
spawn $ODMR account me example.org
expect "Secret: "; send "hidden\r"
expect "Again: "; send "hidden\r"
expect "me:example.org:hidden"
expect eof
END
    equal "$(grep -c hidden "$T/tty")" 1
}

# A verifier in the accounts file must have a count within the customer's bounds, and each part the right length.
# not with: OVER_TLS
t_verifiers_in_the_accounts_file() {
    local salt key bad
    salt=$(b64 'sixteen octets..')
    key=$(head -c 32 /dev/zero | openssl base64 -A)
    mkdir "$T/queue"
    for bad in "4095,$salt,$key,$key" "1000001,$salt,$key,$key" "10000000,$salt,$key,$key" "-4096,$salt,$key,$key" \
        "4096x,$salt,$key,$key" ",$salt,$key,$key" "4096,,$key,$key" "4096,$salt,$key" "4096,$salt,$key," \
        "4096,$salt,,$key" \
        "4096,$salt,$key,$key," "4096,$salt,$key,$key x" "4096,$salt=,$key,$key" "4096,****,$key,$key" \
        "4096,$(head -c 65 /dev/zero | openssl base64 -A),$key,$key" "4096,$salt,$(b64 short),$key" \
        "4096,$salt,$key,$(b64 short)" "4096,$salt,$(head -c 33 /dev/zero | openssl base64 -A),$key" \
        "4096,$salt,$key,$(head -c 33 /dev/zero | openssl base64 -A)" ''; do
        accounts; echo "verifier:example.org:{SCRAM-SHA-256}$bad" >> "$T/accounts"
        run 78 "$ODMR" provider -l 127.0.0.1:0 -q "$T/queue" -a "$T/accounts"
        has "$T/err" 'accounts:4: not a verifier'
    done
    accounts
    printf '%s:example.org:{SCRAM-SHA-256}%s\n' least "4096,$salt,$key,$key" most "1000000,$salt,$key,$key" \
        >> "$T/accounts"
    provider
    stop_provider
}

# ---- The program: hostile peers ----------------------------------------------------------------------

# Ten unknown commands before the log-in end a session with 421.
t_ten_bad_commands() {
    local i
    provider
    dial
    expect '^220'
    for i in {1..10}; do ask "X$i" '^502 '; done
    expect '^421 '
    closed
}

# Each of thousands of pipelined commands has its reply.
t_thousands_of_commands_at_once() {
    local i
    provider
    dial
    expect '^220'
    for i in {1..5000}; do echo NOOP; done >&"$LINE" &
    for i in {1..5000}; do expect '^250 '; done
    ask 'QUIT' '^221'
}

# A peer that still sends octets after its 421 does not count as a session any longer.
t_no_place_after_the_end() {
    local n drip
    provider --max-sessions 1 --login-timeout 1
    dial; expect '^220 '; expect '^421 '
    ( trap '' PIPE; for n in {1..80}; do printf x >&"$LINE"; moment 0.1; done ) 2> /dev/null & drip=$!
    STARTED+=("$drip")
    until_true served
    kill -0 "$drip" || fail 'the place was kept until the peer was silent'
    kill "$drip"
}

# A customer that reads steadily but slowly gets the whole message, even if the kernel buffers more than it reads
# within --timeout.
t_slow_reader() {
    unset OVER_TLS # this test speaks in the clear
    provider --timeout 1
    {
        printf 'Subject: big\n\n'; head -c 5000000 /dev/zero | tr '\0' x | fold -w 70
    } | put 1.a a@example.edu eva@example.org
    login; ask ATRN '^250 '
    perl -e '$| = 1; sub line { my $l = ""; while (sysread(STDIN, my $c, 1)) { $l .= $c; last if $c eq "\n" } $l }
        print "220 x\r\n"; while (my $l = line()) {
            if ($l =~ /^DATA/) { print "354 go\r\n"; my ($end, $n) = ("", 0);
                while ($end !~ /\r\n\.\r\n$/) { my $got = sysread(STDIN, my $d, 16384); exit 1 unless $got; $n += $got;
                    $end = substr($end . $d, -9); select undef, undef, undef, $got / 700000 }
                print "250 kept\r\n"; print STDERR "$n\n" }
            elsif ($l =~ /^QUIT/) { print "221 bye\r\n"; exit 0 } else { print "250 OK\r\n" } } exit 1' \
        <&"$LINE" >&"$LINE" 2> "$T/octets" || fail 'it was cut off'
    hang_up
    until_true settled
    equal "$(waiting)" 0
}

# On either side, all lines of a reply together have one --timeout (RFC 5321, 4.5.3.2). The reply takes 16 seconds, or
# longer on a busy machine, and the session must end before the reply does.
t_a_reply_that_drips() {
    serve peer_that_drips
    customer 75 --timeout 3 "127.0.0.1:$PORT"
    has "$T/err" 'the peer kept us waiting too long$'
    [ ! -e "$T/dripped" ] || fail 'the customer waited for each line'
    provider --timeout 3
    put_letter one 1.a a@example.edu eva@example.org
    login; ask ATRN '^250 '; say '220 x'; hear
    drip & STARTED+=($!)
    until_true shows "$LOG" 'disconnected: the peer kept us waiting too long'
    [ ! -e "$T/dripped" ] || fail 'the provider waited for each line'
}
drip() {
    local n
    trap '' PIPE
    for n in {1..20}; do say "250-X-$n" || return 0; moment 0.8; done 2> /dev/null
    touch "$T/dripped"
}
peer_that_drips() { say '220 x'; hear; drip; }

# A connection over --max-per-address or --max-sessions gets 421, until another session has ended (RFC 5321, 3.8).
# not with: OVER_TLS
t_limits_on_sessions() {
    local a b
    provider --max-per-address 2 --max-sessions 3
    dial; expect '^220'; a=$LINE
    dial; expect '^220'; b=$LINE
    dial; expect '^421 '; closed
    hang_up; LINE=$b; ask QUIT '^221'; closed
    hang_up; until_true served
    provider --max-sessions 1
    dial; expect '^220'
    dial; expect '^421 '; closed
}

# --max-per-address counts an IPv6 /64 as one address and each IPv4 address separately, also in its IPv6 form.
t_limit_of_an_address_is_that_of_a_network() {
    needs socat
    needs_namespaces -n 'a network with more addresses'
    mkdir "$T/queue"; accounts
    export T ODMR
    # shellcheck disable=SC2016
    in_a_network bash -c '
        perl -MSocket=:all -e "socket S, AF_INET6, SOCK_DGRAM, 0;
            ioctl S, 0x8916, pack q(a16Ll), inet_pton(AF_INET6, \$_), 64, 1 or die \$! for @ARGV # SIOCSIFADDR
            " 2001:db8::{1,2} 2001:db8:0:1::1
        "$ODMR" provider -l "*:3660" -q "$T/queue" -a "$T/accounts" -n example.net \
            --max-per-address 1 2> "$T/log" & provider=$!
        trap "kill $provider; wait" EXIT
        until [ "$(grep -c "listening on" "$T/log")" = 2 ] || ! kill -0 "$provider"; do sleep 0.05; done
        from() {
            local n
            timeout 10 socat -u "$1:3660,bind=$2" - & peers+=($!)
            for n in {1..200}; do [ "$(wc -l < "$T/out")" != ${#peers[@]} ] || break; sleep 0.05; done
        }
        for from in "[2001:db8::1]" "[2001:db8::2]" "[2001:db8:0:1::1]"; do from "TCP6:[2001:db8::1]" "$from"; done
        from "TCP6:[::1]" "[::1]"
        for from in 127.0.0.1 127.0.0.2 127.0.0.2; do from TCP4:127.0.0.1 "$from"; done
        kill "${peers[@]}"; wait "${peers[@]}"' > "$T/out" 2> /dev/null
    equal "$(cut -c1-3 "$T/out" | paste -sd ' ')" '220 421 220 220 220 220 421'
}

# The log gives the address of a connection that is reset before it is served.
t_connection_that_is_reset_at_once() {
    provider
    kill -STOP "$PROVIDER"
    perl -MSocket -e 'socket my $s, AF_INET, SOCK_STREAM, 0; connect $s, sockaddr_in($ARGV[0], INADDR_LOOPBACK) or die;
        setsockopt $s, SOL_SOCKET, SO_LINGER, pack "ii", 1, 0; close $s' "$PORT" || fail 'no connection'
    kill -CONT "$PROVIDER"
    until_true shows "$LOG" '127.0.0.1:[0-9]+ disconnected'
    hasnt "$LOG" 'local program'
}

# If a provider cuts a message, sends malformed or endless lines, or is silent, the customer ends with an exit code and
# leaves no half-written file.
t_customer_and_broken_providers() {
    serve peer_cuts
    customer 75 "127.0.0.1:$PORT"
    equal "$(find "$T/mail" -type f | wc -l)" 0
    serve peer_bdat_nonsense
    customer 76 "127.0.0.1:$PORT"
    serve peer_bdat_endless
    customer 76 "127.0.0.1:$PORT"
    serve peer_long_lines
    customer 76 "127.0.0.1:$PORT"
    has "$T/err" 'the provider sent too many bad commands$'
    serve peer_silent
    customer 75 --timeout 3 "127.0.0.1:$PORT"
    peer_ok
}
peer_cuts() {
    reverse
    dialogue <<'END'
P: MAIL FROM:<a@b.example>
C: 250 *
P: RCPT TO:<x@example.org>
C: 250 *
P: DATA
C: 354 *
P: Subject: half
END
}
peer_bdat_nonsense() { peer_with_bdat '10x'; }
peer_bdat_endless() { peer_with_bdat 9223372036854775808; }
peer_with_bdat() {
    reverse
    dialogue <<END
P: MAIL FROM:<a@b.example>
C: 250 *
P: RCPT TO:<x@example.org>
C: 250 *
P: BDAT $1 LAST
C: 501 *
C: (closes)
END
}
peer_long_lines() {
    local long n
    reverse
    long=$(printf '%020000d' 0)
    for n in {1..99}; do ask "$long" '^500 '; done
    ask "$long" '^421 '
    closed
}
peer_silent() { reverse; sleep 6; }

# Each of 1,000 idle sessions uses at most 64 kB of resident memory.
# not with: SANITIZE, OVER_TLS
t_memory_of_idle_sessions() {
    local i before after
    ulimit -n 4096 2> /dev/null || skip 'needs 4096 descriptors'
    provider --max-sessions 2000 --max-per-address 2000
    dial; expect '^220'
    before=$(awk '/^VmRSS/ { print $2 }' "/proc/$PROVIDER/status")
    for i in {1..1000}; do dial; say 'EHLO x'; done
    expect '^220'; expect '^250'
    until_true counted 1001 ' connected' "$LOG"
    sleep 0.5
    after=$(awk '/^VmRSS/ { print $2 }' "/proc/$PROVIDER/status")
    [ $(((after - before) / 1000)) -le 64 ] || fail "$(((after - before) / 1000)) kB a session"
}

# A message of 250 MB uses no more memory than a small one, on either side.
# not with: SANITIZE, OVER_TLS
t_memory_of_a_large_message() {
    local small
    provider
    put_letter one 1.a a@example.edu eva@example.org
    customer 0 "127.0.0.1:$PORT"
    small=$(rss "$PROVIDER")
    {
        printf 'Subject: big\n\n'; yes "$(printf '%075d' 0)" | head -c 250000000
    } | put 2.a a@example.edu eva@example.org
    ( ulimit -v 300000; customer 0 "127.0.0.1:$PORT" ) || fail 'the customer needs more memory'
    [ $(($(rss "$PROVIDER") - small)) -le 1024 ] || fail "$(($(rss "$PROVIDER") - small)) kB more"
    equal "$(waiting)" 0
}

# Each of 100,000 recipients uses some hundred octets and is sent once, and a message with one more is held.
# not with: SANITIZE, OVER_TLS
t_memory_of_many_recipients() {
    local small
    sink
    provider
    put_letter one 1.a a@example.edu eva@example.org
    ODMR_SECRET=tanstaaf run 0 "$ODMR" customer -u example.org --smtp "127.0.0.1:$SINK" "127.0.0.1:$PORT"
    small=$(rss "$PROVIDER")
    {
        printf 'Return-Path: <a@example.edu>\n'; seq -f 'Delivered-To: r%.0f@example.org' 100000; letter two
    } > "$T/queue/example.org/new/2.a"
    rm "$T"/sink/*
    ODMR_SECRET=tanstaaf run 0 "$ODMR" customer -u example.org --smtp "127.0.0.1:$SINK" "127.0.0.1:$PORT"
    [ $(($(rss "$PROVIDER") - small)) -le 10240 ] || fail "$(($(rss "$PROVIDER") - small)) kB more"
    equal "$(cat "$T"/sink/* | grep -c '^X-Rcpt-Args: <r[0-9]*@example.org>')" 100000
    equal "$(waiting)" 0
    { seq -f 'Delivered-To: r%.0f@example.org' 100001; letter three; } > "$T/queue/example.org/new/3.a"
    login; ask ATRN '^453 '
    has "$LOG" 'held example.org/new/3.a: more than 100,000 recipients in its envelope$'
}

# ---- The program: faults -----------------------------------------------------------------------------

# If the customer cannot write, it replies 452 and ends with exit code 73, and the mail stays with the provider.
t_customer_cannot_write() {
    provider
    : > "$T/file"
    put_letter one 1.a a@example.edu eva@example.org
    ODMR_SECRET=tanstaaf run 73 "$ODMR" customer -u example.org -q "$T/file" "127.0.0.1:$PORT"
    hasnt "$LOG" connected
    mkdir "$T/mail"; : > "$T/mail/example.org"
    customer 73 --trace "127.0.0.1:$PORT"
    has "$T/err" 'C: 452 '
    rm "$T/mail/example.org"
    { letter two; printf '%0100000d\n' 0; } | put 2.a a@example.edu eva@example.org
    until_true claimable "$T/queue/example.org/new/1.a"
    ( ulimit -f 64; customer 73 --trace "127.0.0.1:$PORT" )  # a file has at most 64 kB
    has "$T/err" 'C: 250 .*stored'
    has "$T/err" 'C: 452 '
    equal "$(mailbox)" 1
    equal "$(ls "$T/mail/example.org/tmp")" ''
    until_true claimable "$T/queue/example.org/new/2.a"
    customer 0 "127.0.0.1:$PORT"
    equal "$(mailbox) $(waiting)" '2 0'
}

# On a full disk the customer replies 452 and leaves no file, and the mail stays with the provider.
t_customer_with_a_full_disk() {
    needs_namespaces -m 'a small disk'
    provider
    head -c 3000000 /dev/zero | tr '\0' x | fold -w 75 > "$T/big"
    { letter big; cat "$T/big"; } | put 1.a a@example.edu eva@example.org
    put_letter small 2.a a@example.edu eva@example.org
    mkdir "$T/mail"
    # shellcheck disable=SC2016
    run 73 unshare -m bash -c 'mount -t tmpfs -o size=1m none "$1/mail" || exit 1
        ODMR_SECRET=tanstaaf "$2" customer -u example.org -q "$1/mail" --trace "127.0.0.1:$3"; code=$?
        find "$1/mail" -type f > "$1/left"; exit $code' - "$T" "$ODMR" "$PORT"
    has "$T/err" '^\[1\] C: 452 '
    equal "$(wc -l < "$T/left")" 1
    hasnt "$T/left" org/tmp/
    until_true settled
    equal "$(find "$T/queue/example.org/new" -type f)" "$T/queue/example.org/new/1.a"
    customer 0 "127.0.0.1:$PORT"
    stored > "$T/stored"; { letter big; cat "$T/big"; echo; } > "$T/wanted"
    same "$T/wanted" "$T/stored"
    equal "$(waiting)" 0
}

# If the customer is short of descriptors, it stores the messages that wait for the disk and then takes the next.
t_customer_short_of_descriptors() {
    serve peer_in_a_hurry_for_one
    ( ulimit -n 14; customer 0 "127.0.0.1:$PORT" ) || exit 1
    peer_ok
    equal "$(mailbox)" 30
}
peer_in_a_hurry_for_one() {
    local n
    reverse
    for n in {1..30}; do
        printf 'MAIL FROM:<a@b.example>\r\nRCPT TO:<x@example.org>\r\nBDAT 4 LAST\r\nn: %d' $((n % 10))
    done > "$T/hurry"
    printf 'QUIT\r\n' >> "$T/hurry"
    cat "$T/hurry" >&"$LINE_OUT"
    for n in {1..30}; do expect '^250 2.1.0'; expect '^250 2.1.5'; expect '^250 .* stored'; done
    expect '^221 '
}

# If the provider is short of descriptors, it handles the outstanding replies, continues, and skips no message.
t_a_provider_short_of_descriptors() {
    local PATIENCE=$((PATIENCE * 4))
    needs prlimit
    put_many 60
    AROUND=(prlimit --nofile=30:30)
    provider
    login; ask ATRN '^250 '
    receiver 'greets(qw(PIPELINING CHUNKING)); my ($n, $owed) = (0, 0);
        while (1) {
            my $l = heard(); if ($l eq "QUIT") { said(221); print STDERR "$n with QUIT\n"; exit }
            if ($l =~ /^BDAT (\d+)/) { content($1); $n++ }
            $owed++; my $r = ""; vec($r, 0, 1) = 1; # sends replies as late as possible
            if (!select $r, undef, undef, 0.02) { print "250 ok\r\n" x $owed; $owed = 0 }
        }' 2> "$T/count" || fail "exit $? of the receiver: it was not done in $PATIENCE s"
    matches "$T/count" '^60 with QUIT$'
    until_true settled
    equal "$(waiting)" 0
}

# odmr fetches OpenSSL's algorithms at the start, so the first session needs no more memory than the second.
# not with: SANITIZE, OVER_TLS
t_algorithms_are_fetched_at_the_start() {
    local options before sessions count i OVER_TLS=
    make -s -C "$here" build/fail.so || fail 'not built'
    authority
    for options in '--mechanism CRAM-MD5' '--mechanism SCRAM-SHA-256' "--ca $T/ca.crt --mechanism PLAIN"; do
        before=0
        for sessions in 1 2; do
            fault malloc 0 ENOMEM accept4
            AROUND=("${FAULT[@]}")
            if [[ $options == *PLAIN ]]; then tls_provider; else provider; fi
            AROUND=()
            # shellcheck disable=SC2086
            for ((i = 0; i < sessions; i++)); do customer 1 $options "localhost:$PORT"; done
            stop_provider
            count=$(sed -n 's/^malloc //p' "$T/fired")
            [ "$sessions" = 1 ] || [ $((before * 2)) -le $((count + 20)) ] ||
                fail "$options: $before calls of malloc in the first session, $((count - before)) in the second"
            before=$count
        done
    done
}

# If another host has handled a message between open and lock, as on NFS with a stale cache, each recipient still gets
# it once.
# not with: SANITIZE, OVER_TLS
t_stale_look_ups() {
    local stale n name ports=() pids=()
    run 0 make -s -C "$here" build/stale.so
    for stale in attributes estale; do
        rm -rf "$T/queue" "$T"/s?
        mkdir -p "$T/queue/example.org"/{new,cur,tmp}
        for n in {1..150}; do
            name=$T/queue/example.org/new/$n.a
            printf 'Delivered-To: %s@example.org\n' "r1.$n" "r2.$n" "later.$n" > "$name"; letter "$n" >> "$name"
        done
        AROUND=(env STALE=$stale LD_PRELOAD="$here/build/stale.so")
        provider; ports[0]=$PORT; provider; ports[1]=$PORT
        AROUND=() pids=()
        for n in 0 1 2 3; do
            ( receives_some "$n" "${ports[n % 2]}" ) & pids+=($!); STARTED+=($!)
        done
        for n in "${pids[@]}"; do
            wait "$n" || fail "$stale: a session ended as it should not: $(cat "$T"/s?.failed)"
        done
        equal "$(cat "$T"/s?.got | sort | uniq -d | wc -l)" 0 "$stale: recipients who were served twice"
        equal "$(sort -u "$T"/s?.got | wc -l) $(cat "$T/queue/example.org/new"/* | grep -c '^Delivered-To: r[12].*@')" \
            '300 0' "$stale: recipients who were served"
        ! grep -h 'ended early' "$T"/provider*.log || fail "$stale: a session was broken off"
    done
}

# If another session removes a file between openat() and flock(2) and the path still has its old attributes, nothing is
# sent.
# not with: SANITIZE
t_removed_before_the_claim() {
    local session
    run 0 make -s -C "$here" build/stale.so
    put_letter one 1.a a@example.edu eva@example.org
    AROUND=(env STALE=overtaken LD_PRELOAD="$here/build/stale.so")
    provider
    ( login; ask ATRN '^453 ' ) & session=$!; STARTED+=("$session")
    is_open() { find "/proc/$PROVIDER/fd" -lname '*/1.a' | grep -q .; }
    until_true is_open
    rm "$T/queue/example.org/new/1.a"
    wait "$session" || fail 'the file was removed, and the reply to ATRN is not 453'
}
# receives_some N PORT: plays six sessions of a customer that defers some recipients. $T/sN.got has the recipients that
# have their message.
receives_some() {
    local n=$1 i
    : > "$T/s$n.got"
    for i in {1..6}; do
        dial "$2"; expect '^220 '; ask 'EHLO example.org' '^250'; auth_cram_md5 example.org tanstaaf '^235 '; say ATRN
        expect '^(250|451|453) '
        if [[ $ANSWER == 250* ]]; then
            receiver 'greets(); my @to;
                while (1) {
                    my $l = heard(); if ($l eq "QUIT") { said(221); exit }
                    if ($l =~ /^RCPT TO:<(.*)>/) { if ($1 =~ /^later/) { said("450 later"); next } push @to, $1 }
                    if ($l eq "DATA") { said(354); 1 while heard() ne "."; print STDERR "$_\n" for @to; @to = () }
                    @to = () if $l =~ /^MAIL/; said("250 ok");
                }' 2>> "$T/s$n.got" || { echo "$n" > "$T/s$n.failed"; exit 1; }
        fi
        hang_up
    done
}

# If the queue's mount is gone, ATRN has the reply 451 and the log has one line for each ATRN.
# not with: SANITIZE, OVER_TLS
t_a_mount_that_is_gone() {
    run 0 make -s -C "$here" build/stale.so
    put_many 30
    AROUND=(env STALE=gone LD_PRELOAD="$here/build/stale.so")
    provider
    login
    ask ATRN '^451 '; ask ATRN '^451 '
    equal "$(grep -c 'example.org/new.*endpoint is not connected' "$LOG")" 2
    equal "$(waiting)" 30
}

# If all mail is too old at the start, the clock may be wrong, so the provider returns none until the next look. A
# change of the directory is no sign of a right clock if it is too old as well, or later than the start.
t_a_clock_that_is_years_ahead() {
    local n
    for n in 1 2 3; do put_letter "$n" "$((1000000000 + n)).M1.a" sender@example.edu eva@example.org; done
    put_letter 4 1000000004.M1.a sender@example.edu eva@example.com
    touch -d @1000000003 "$T/queue/example.org/new"
    touch -d tomorrow "$T/queue/example.com/new"
    variant 's/^#define CARE_INTERVAL 3600 /#define CARE_INTERVAL 2 /'
    provider --max-age 3
    until_true counted 2 \
        'all mail of example\.... is older than --max-age 3 days: none is returned for an hour; check the clock$' "$LOG"
    equal "$(waiting) $(notices)" '4 0'
    until_true eval '[ "$(waiting)" = 0 ]'
    until_true eval '[ "$(notices)" = 4 ]'
    equal "$(grep -c 'check the clock$' "$LOG")" 2
}

# A file with a time beyond the calendar is listed, sent and named in a notice like any other.
t_time_beyond_the_calendar() {
    local queue=/dev/shm/odmr-test.$$
    mkdir "$queue" 2> /dev/null || skip 'there is no /dev/shm'
    trap 'kill -9 "${STARTED[@]}"; wait; rm -rf "'"$queue"'"' EXIT
    ln -s "$queue" "$T/queue"
    put_letter one a.x a@example.edu eva@example.org
    touch -d @9000000000000000000 "$queue/example.org/new/a.x"
    [ "$(stat -c %Y "$queue/example.org/new/a.x")" = 9000000000000000000 ] || skip 'no such time in /dev/shm'
    run 0 "$ODMR" queue -q "$T/queue" -l
    has "$T/out" '^example.org  *1 .* 1970-01-01 00:00:00 '
    printf '#!/bin/sh\nexec cat > "%s/notice.$$"\n' "$T" > "$T/sendmail"; chmod 755 "$T/sendmail"
    provider
    ANSWERS=([RCPT]='550 5.1.1 no such user')
    turn
    until_true settled
    has "$(echo "$T"/notice.*)" '^Arrival-Date: Thu, 01 Jan 1970 00:00:00 +0000$'
    equal "$(waiting)" 0
}

# A message over 4 GiB is sent whole, also on a 32-bit system.
t_messages_over_4_gib() {
    mkdir -p "$T/queue/example.org"/{new,cur,tmp}
    printf 'Return-Path: <a@example.edu>\nDelivered-To: eva@example.org\nSubject: long\n\n' \
        > "$T/queue/example.org/new/1.a"
    truncate -s 4300000000 "$T/queue/example.org/new/1.a"
    touch -d '2200-01-01' "$T/queue/example.org/new/1.a"
    run 0 "$ODMR" queue -q "$T/queue" -l
    has "$T/out" '4300000000 '
    has "$T/out" '2200-01-01'
    [[ $(head -c 5 "$ODMR") == *$'\x01' ]] || return 0 # reading takes ten seconds, so only on 32 bits
    PATIENCE=200
    provider
    OFFER='SIZE=1000000'
    turn
    equal "$N_GOT" 0
    equal "$(notices)" 1
    equal "$(waiting)" 0
}

# ---- Real peers --------------------------------------------------------------------------------------

# postfix_instance MAIN_CF_LINES MASTER_CF_LINES: starts a Postfix on 127.0.0.1:$MX with its own spool, which stops when
# the test ends. The test starts master directly, without the hundred processes of "postfix start" that check the
# installation.
postfix_instance() {
    needs postfix
    [ "$(id -u)" = 0 ] || skip 'Postfix refuses to start without root'
    chmod 755 "$T"
    MX=$(free_port)
    mkdir -p "$T/postfix/etc" "$T/postfix/spool/pid"
    install -d -o postfix "$T/postfix/data" \
        "$T/postfix/spool/"{active,bounce,corrupt,defer,deferred,flush,hold,incoming,maildrop} \
        "$T/postfix/spool/"{private,public,saved,trace}
    chgrp postdrop "$T/postfix/spool/"{maildrop,public}; chmod g+wx "$T/postfix/spool/"{maildrop,public}
    cat > "$T/postfix/etc/main.cf" <<END
compatibility_level = 3.6
queue_directory = $T/postfix/spool
data_directory = $T/postfix/data
myhostname = mx.example.org
mydestination =
alias_maps =
alias_database =
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
mynetworks = 127.0.0.0/8
smtputf8_enable = yes
maillog_file = $T/postfix/log
maillog_file_prefixes = $T
$1
END
    { sed -e '/^smtp .*inet/d' -e 's/^\([a-z-]* *[a-z]* *[-ny] *[-ny] *\)y /\1n /' /etc/postfix/master.cf.proto \
            2> /dev/null ||
        sed -e '/^smtp .*inet/d' /usr/share/postfix/master.cf.dist; } > "$T/postfix/etc/master.cf"
    printf '127.0.0.1:%s inet n - n - - smtpd\npostlog unix-dgram n - n - 1 postlogd\n%s\n' "$MX" "$2" \
        >> "$T/postfix/etc/master.cf"
    : > "$T/postfix/etc/dynamicmaps.cf"
    "$(PATH=$PATH:/usr/sbin postconf -dh daemon_directory)/master" -c "$T/postfix/etc" > "$T/postfix/started" 2>&1 &
    MASTER=$! # master ends its own processes
    trap 'kill "$MASTER"; for p in "${STARTED[@]}"; do kill -9 "$p" 2> /dev/null; done; wait 2> /dev/null' EXIT
    until_true eval '! kill -0 "$MASTER" || reachable "$MX"'
    kill -0 "$MASTER" || { cat "$T/postfix/started" "$T/postfix/log"; fail 'Postfix does not start'; }
}

boxed() { how_many '"$T"/boxes/{,*/*/}new/*'; }

# recipe FILE: prints the blocks "# FILE" of README and odmr-queue(5).
recipe() {
    {
        cat "$here/README"
        sed -n '/^\.Bd -literal/,/^\.Ed/s/^/    /p; /^\.Ed/s/^/end /p' "$here/.ci/odmr-queue.5.in"
    } | grep -v '^    \.[BE]d' |
        awk -v mark="    # $1" '$0 == mark { on = found = 1; next } /^    # [\/~]/ || /^[^ ]/ { on = 0 }
            on { print substr($0, 5) } END { exit !found }' || fail "there is no recipe for $1"
}

# unpacked PACKAGE...: sets TREE to a root directory with these Debian packages, installed or not, and their libraries.
# The first caller makes it, in build/.
unpacked() {
    needs apt-get dpkg-deb flock
    TREE=$here/build/unpacked/$1
    mkdir -p "${TREE%/*}"
    ( flock 9 && { [ -e "$TREE/complete" ] || unpack "$@"; } ) 9> "$TREE.lock" > "$T/unpack.log" 2>&1 ||
        skip "$1 cannot be unpacked: $(tail -n 1 "$T/unpack.log")"
}
unpack() {
    local package
    rm -rf "$TREE"
    mkdir -p "$TREE"/{archives/partial,dev,etc,run,tmp,var/run,var/spool}
    apt-get install -q -y --no-install-recommends --reinstall --download-only -o Debug::NoLocking=1 \
        -o APT::Sandbox::User=root -o "Dir::Cache::archives=$TREE/archives" "$@" || return
    for package in "$TREE"/archives/*.deb; do dpkg-deb -x "$package" "$TREE" || return; done
    rm -r "$TREE/archives"
    libraries | xargs cp -L --parents -t "$TREE" /bin/sh && touch "$TREE/complete"
}
# Prints the libraries of this system that the programs of the tree need.
libraries() {
    find "$TREE" -type f \( -perm /111 -o -name '*.so*' \) -exec ldd {} + 2> /dev/null |
        sed -n 's/^\t\(.* => \)\{0,1\}\(\/[^ ]*\) (0x.*/\2/p' | sort -u
}

# jail PACKAGES USER...: sets JAIL to this test's copy of the packages' root directory, in which they find their usual
# paths, with these users and odmr. The user odmr is nobody outside. The jail's queue is $T/queue.
jail() {
    local user n=900
    needs_capabilities 'jail' CHOWN SETUID SYS_CHROOT MKNOD
    read -ra user <<< "$1"
    unpacked "${user[@]}"
    shift
    JAIL=$T/jail
    chmod 755 "$T"
    cp -a "$TREE" "$JAIL"
    mknod -m 666 "$JAIL/dev/null" c 1 3 || skip 'no device can be made here'
    for user in root:0:0 "odmr:$(id -u nobody):$(id -g nobody)" "$@"; do
        [[ $user == *:* ]] || { n=$((n + 1)); user=$user:$n:$n; }
        echo "${user/:/:x:}::/var/lib/opensmtpd/empty:/bin/sh" >> "$JAIL/etc/passwd"
        echo "${user%%:*}:x:${user##*:}:" >> "$JAIL/etc/group"
    done
    install -d -m 700 -o nobody "$JAIL/var/spool/odmr"
    ln -s jail/var/spool/odmr "$T/queue"
}
# jailed PORT COMMAND...: runs the command in the jail, and waits until it listens on this port.
jailed() {
    local port=$1
    shift
    chroot "$JAIL" "$@" > "$T/jail.log" 2>&1 &
    STARTED+=($!)
    until_true reachable "$port"
}

# awkward NAME: prints a letter with lines that a mail server might change.
awkward() {
    printf '%s\n' 'From: a@example.edu' 'To: b@example.org' "Subject: $1" 'Date: Mon, 1 Jan 2024 09:00:00 +0000' \
        "Message-ID: <$1@example.edu>" 'Delivered-To: earlier@hop.example' 'MIME-Version: 1.0' \
        'Content-Type: text/plain; charset=utf-8' 'Content-Transfer-Encoding: 8bit' '' "Text of $1." '.' '..' \
        'From the start of a line' '>From' $'a tab\tand blanks  ' $'\xc3\xa9' "$(printf '%0990d' 0)" '' ''
}
# submit PORT SENDER FILE RECIPIENT...: sends a letter to a mail server.
submit() {
    local sender=$2 file=$3 recipient
    dial "$1"
    expect '^220 '
    ask 'EHLO client.example' '^250'
    ask "MAIL FROM:<$sender> BODY=8BITMIME" '^250 '
    shift 3
    for recipient; do ask "RCPT TO:<$recipient>" '^250 '; done
    ask DATA '^354 '
    sed -e 's/^\./../' -e 's/$/\r/' "$file" >&"$LINE"
    ask . '^250 '
    ask QUIT '^221 '
    hang_up
}
# envelopes FILE...: prints subject, sender and recipient of take_mail's files, one recipient a line, sorted.
envelopes() {
    awk -F '[<>]' 'FNR == 1 { n = 0; sender = $2 } /^RCPT TO:/ { to[n++] = $2 }
        /^Subject: / { sub(/\r$/, ""); for (i = 0; i < n; i++) print substr($0, 10), "<" sender ">", "<" to[i] ">";
            nextfile }' "$@" | sort
}
waits() { [ "$(waiting)" = "$1" ]; }

# fills_the_queue PORT FILES: checks that the mail server on this port makes FILES files of two letters, and that they
# leave the queue with unchanged envelopes and octets.
fills_the_queue() {
    local file letter
    awkward one > "$T/one"
    awkward two > "$T/two"
    submit "$1" s@example.edu "$T/one" Eva@example.org bob@Example.org x@example.com y@example.com
    submit "$1" '' "$T/two" eva+tag@example.org
    until_true waits "$2"
    provider --user nobody
    OFFER=8BITMIME
    turn
    equal "$N_GOT" "$2"
    equal "$(waiting)" 0
    equal "$(envelopes "$T"/got/*)" 'one <s@example.edu> <Eva@example.org>
one <s@example.edu> <bob@Example.org>
one <s@example.edu> <x@example.com>
one <s@example.edu> <y@example.com>
two <> <eva+tag@example.org>'
    for file in "$T"/got/*; do
        sed -n '/^From: a@/,$p' "$file" > "$T/arrived"
        letter=$(sed -n 's/^Subject: \(.*\)\r$/\1/p' "$file")
        wire < "$T/$letter" | cmp - "$T/arrived" || fail "letter $letter has changed on its way"
    done
    ! grep -qi '^\(Return-Path\|X-Original-To\|Envelope-To\|Delivery-Date\):' "$T"/got/* ||
        fail 'envelope fields were relayed'
}

# hands_on HOW: queues the letters $T/one and $T/two for the customer's domain, and a third for a domain that Postfix
# does not receive. Checks that README's customer delivers the two to this Postfix.
hands_on() {
    local command
    provider
    put 1.a s@example.edu Eva@example.org bob@example.org < "$T/one"
    put 2.a '' eva+tag@example.org < "$T/two"
    put_letter three 3.a s@example.edu x@example.com
    (umask 077; echo tanstaaf > "$T/secret")
    command=$(recipe "/etc/cron.d/odmr, $1" | cut -d ' ' -f 7- |
        sed "s|/usr/local/bin/odmr|$ODMR|; s|/etc/odmr/secret|$T/secret|; s|:2525|:$MX|
            s|odmr.example.net|127.0.0.1:$PORT|")
    run 0 env MAIL_CONFIG="$T/postfix/etc" sh -c "$command"
    equal "$(cat "$T/err")" ''
    equal "$(waiting)" 0
    until_true boxes_have 3
    boxed_as_sent one '<s@example.edu>' Eva@example.org bob@example.org
    boxed_as_sent two '<>' eva+tag@example.org
}
boxes_have() { [ "$(boxed)" = "$1" ]; }
# boxed_as_sent LETTER SENDER RECIPIENT...: checks that each recipient has the letter with this envelope, unchanged.
boxed_as_sent() {
    local letter=$1 sender=$2 recipient file
    shift 2
    for recipient; do
        file=$(grep -lx "Delivered-To: $recipient" $(grep -lx "Subject: $letter" "$T"/boxes/new/*)) ||
            fail "$recipient has no letter $letter"
        has "$file" "^Return-Path: $sender\$"
        sed -n '/^From: a@/,$p' "$file" | cmp - "$T/$letter" || fail "letter $letter has changed on its way"
    done
}
# Starts a Postfix that stores all mail for example.org in $T/boxes.
customers_postfix() {
    install -d -o nobody "$T/boxes"
    postfix_instance "virtual_mailbox_domains = example.org
virtual_mailbox_base = $T/boxes
virtual_mailbox_maps = inline:{ @example.org=./ }
virtual_uid_maps = static:$(id -u nobody)
virtual_gid_maps = static:$(id -g nobody)
default_transport = discard" "$1"
}

# swaks logs in with PLAIN and CRAM-MD5 over TLS, and not with a wrong secret.
# not with: OVER_TLS
t_swaks_authenticates() {
    local mechanism
    needs swaks
    tls_provider --max-per-address 100
    for mechanism in PLAIN CRAM-MD5; do
        swaks -s 127.0.0.1 -p "$PORT" -tls --tls-ca-path "$T/ca.crt" -a "$mechanism" -au example.org -ap tanstaaf \
            --quit-after AUTH > "$T/out" 2>&1 || { cat "$T/out" >&2; fail "swaks $mechanism"; }
        has "$LOG" "authenticated as example.org ($mechanism, "
        ! swaks -s 127.0.0.1 -p "$PORT" -tls -a "$mechanism" -au example.org -ap wrong --quit-after AUTH > "$T/out" \
            2>&1 ||
            fail 'a wrong secret was accepted'
    done
}

# GNU SASL logs in with each mechanism that it has.
# not with: OVER_TLS
t_gsasl_authenticates() {
    needs gsasl
    tls_provider
    gsasl_logs_in SCRAM-SHA-256 --no-starttls
    gsasl_logs_in CRAM-MD5 --no-starttls
    gsasl_logs_in SCRAM-SHA-256 --no-cb --x509-ca-file="$T/ca.crt"
    gsasl_logs_in SCRAM-SHA-256-PLUS --x509-ca-file="$T/ca.crt"
    gsasl_logs_in PLAIN --x509-ca-file="$T/ca.crt"
}
gsasl_logs_in() {
    local mechanism=$1
    shift
    echo |
        timeout "$PATIENCE" gsasl --client --smtp --connect "localhost:$PORT" -m "$mechanism" -a example.org \
        -p tanstaaf "$@" \
        > "$T/out" 2>&1 || { cat "$T/out" "$LOG" >&2; fail "gsasl $mechanism $*"; }
    has "$LOG" "authenticated as example.org ($mechanism, "
}

# fetchmail in ODMR mode collects mail over implicit TLS.
# not with: OVER_TLS
t_fetchmail_over_tls() {
    local i
    needs fetchmail socat
    sink
    tls_provider
    for i in {1..5}; do { letter one; seq 5000; } | put "$i.a" a@example.edu eva@example.org; done
    MX=$SINK PORT=$TLS_PORT \
        FETCHMAIL_TLS="ssl sslproto 'tls1.2+' sslcertck sslcertfile $T/ca.crt sslcommonname localhost" \
        fetchmail_collects
    equal "$(waiting)" 0
    has "$LOG" 'authenticated as example.org (CRAM-MD5, TLSv1.[23] '
}

mailboxes_postfix() {
    local i domain
    for i in {0..6}; do
        for domain in example.org example.com; do echo "/^r$i@$domain\$/ $domain/r$i/"; done
    done > "$T/boxes.map"
    mkdir -p "$T/boxes"; chown nobody "$T/boxes"
    postfix_instance "virtual_mailbox_domains = example.org example.com
virtual_mailbox_base = $T/boxes
virtual_mailbox_maps = regexp:$T/boxes.map
virtual_uid_maps = static:$(id -u nobody)
virtual_gid_maps = static:$(id -g nobody)" ''
}

# fetchmail in ODMR mode delivers 60 messages to a real Postfix, each once.
t_fetchmail_into_postfix() {
    local i tld=(org com)
    needs fetchmail
    mailboxes_postfix
    provider
    for i in {1..60}; do put_letter "$i" "$i.a" sender@example.edu "r$((i % 7))@example.${tld[i % 2]}"; done
    fetchmail_collects
    until_true eval '[ $(boxed) = 60 ]'
    equal "$(cat "$T"/boxes/*/*/new/* | sed -n 's/^Text of \(.*\)\./\1/p' | sort -n | tr '\n' ' ')" \
        "$(seq 60 | tr '\n' ' ')"
    for i in {0..6}; do
        for n in 0 1; do
            equal "$(cat "$T/boxes/example.${tld[n]}/r$i/new"/* | sed -n 's/^Text of \(.*\)\./\1/p' | sort -n |
                xargs)" "$(seq 60 | awk "\$1 % 7 == $i && \$1 % 2 == $n" | xargs)"
        done
    done
    equal "$(grep -l '^Return-Path: <sender@example.edu>' "$T"/boxes/*/*/new/* | wc -l)" 60
    equal "$(waiting)" 0
}
# Runs fetchmail with README's configuration.
fetchmail_collects() {
    { recipe '~/.fetchmailrc' | sed -e "s/odmr.example.net/127.0.0.1/; s/service 366/service $PORT/" \
        -e "s|127.0.0.1/2525|127.0.0.1/$MX|"
      echo "    ${FETCHMAIL_TLS:-}"; } > "$T/fetchmailrc"
    chmod 600 "$T/fetchmailrc"
    FETCHMAILHOME=$T run 0 fetchmail -f "$T/fetchmailrc" --pidfile "$T/fetchmail.pid" --nosyslog -v
}

# unjailed: puts the queue, the program and the user of this test into a configuration.
unjailed() {
    sed -e "s|/var/spool/odmr|$T/queue|; s|/usr/local/bin/odmr enqueue|$T/odmr enqueue -q $T/queue|" \
        -e "s|static:998|static:$(id -u nobody)|; s|user=odmr|user=nobody|"
}

# Postfix with README's configuration fills the queue: virtual(8) writes a file for each recipient in example.org, and
# pipe(8) runs odmr enqueue for example.com.
t_postfix_fills_the_queue() {
    chmod 755 "$T"
    install -d -o nobody "$T/queue"
    cp "$ODMR" "$T/odmr"
    postfix_instance "$(recipe '/etc/postfix/main.cf of the provider' | unjailed)" \
        "$(recipe '/etc/postfix/master.cf of the provider' | unjailed)"
    fills_the_queue "$MX" 4
}

# Exim with README's configuration fills the queue.
t_exim_fills_the_queue() {
    local port
    jail 'exim4-daemon-light exim4-base' Debian-exim
    port=$(free_port)
    install -d -o 901 -g 901 "$JAIL"/var/{spool,log}/exim4
    mkdir -p "$JAIL/etc/exim4"
    { recipe '/etc/exim4/exim4.conf, main section'
      printf '%s\n' 'primary_hostname = mx.example.net' 'local_interfaces = 127.0.0.1' "daemon_smtp_ports = $port" \
          'keep_environment =' 'tls_advertise_hosts =' 'acl_smtp_rcpt = accept domains = +relay_to_domains' \
          'begin routers'
      recipe '/etc/exim4/exim4.conf, first router'
      echo 'begin transports'
      recipe '/etc/exim4/exim4.conf, transports'
    } > "$JAIL/etc/exim4/exim4.conf"
    jailed "$port" /usr/sbin/exim4 -bdf
    fills_the_queue "$port" 3
}

# OpenSMTPD with README's configuration fills the queue.
t_opensmtpd_fills_the_queue() {
    local port
    jail opensmtpd opensmtpd opensmtpq
    port=$(free_port)
    mkdir -p "$JAIL/var/lib/opensmtpd/empty" "$JAIL/var/spool/smtpd"
    chmod 711 "$JAIL/var/spool/smtpd"
    echo mx.example.net > "$JAIL/etc/mailname"
    { echo "listen on 127.0.0.1 port $port"; recipe /etc/smtpd.conf; } > "$JAIL/etc/smtpd.conf"
    jailed "$port" /usr/sbin/smtpd -d
    fills_the_queue "$port" 5
}

# Dovecot with README's configuration, for the version that is installed, fills the queue.
t_dovecot_fills_the_queue() {
    local port debian='2.3 (Debian 12)'
    jail 'dovecot-lmtpd dovecot-core' dovecot dovenull
    [[ $(chroot "$JAIL" /usr/sbin/dovecot --version) == 2.3.* ]] || debian='2.4 (Debian 13)'
    port=$(free_port)
    { recipe "/etc/dovecot/dovecot.conf of Dovecot $debian"; echo 'log_path = /dev/stderr'; echo 'ssl = no'; } |
        sed "s/port = 24$/port = $port/" > "$JAIL/etc/dovecot/dovecot.conf"
    jailed "$port" /usr/sbin/dovecot -F
    postfix_instance "$(recipe '/etc/postfix/main.cf in front of Dovecot' | sed "s/:24$/:$port/")" ''
    fills_the_queue "$MX" 5
}

# README's Postfix service for --smtp neither relays nor completes header fields, although its client is 127.0.0.1.
t_customer_hands_on_to_postfix_by_smtp() {
    local port
    awkward one > "$T/one"
    awkward two | sed 's/^To: .*/To: bob/' > "$T/two"
    port=$(free_port)
    customers_postfix "$(recipe '/etc/postfix/master.cf of the customer' | sed "s/:2525/:$port/")"
    MX=$port
    hands_on 'by --smtp'
    equal "$(notices)" 1
    has "$T/notice.1" 'x@example.com'
}

# README's Postfix service for --exec takes the mail.
t_customer_hands_on_to_postfix_by_exec() {
    awkward one > "$T/one"
    awkward two > "$T/two"
    customers_postfix ''
    hands_on 'by --exec'
    equal "$(notices)" 0
}

# make install puts the units where systemd finds them, systemd-analyze finds no error in them, and make uninstall
# removes all files.
# not with: SANITIZE, OVER_TLS
t_systemd_units() {
    local unit
    needs make systemd-analyze
    run 0 make -s -C "$here" install PREFIX=/usr DESTDIR="$T/root"
    [ -x "$T/root/usr/bin/odmr" ] || fail 'odmr is not installed'
    run 0 make -s -C "$here" install PREFIX="$T/usr"
    for unit in provider customer; do
        has "$T/root/usr/lib/systemd/system/odmr-$unit.service" "^ExecStart=/usr/bin/odmr $unit "
        run 0 systemd-analyze verify "$T/usr/lib/systemd/system/odmr-$unit.service"
        equal "$(cat "$T/out" "$T/err")" ''
        run 0 systemd-analyze security --no-pager --offline=true \
            --threshold=30 "$T/usr/lib/systemd/system/odmr-$unit.service"
    done
    run 0 make -s -C "$here" uninstall PREFIX="$T/usr"
    equal "$(find "$T/usr" -type f)" ''
    # the program accepts the command of each unit
    has "$T/root/usr/lib/systemd/system/odmr-provider.service" 'provider --user odmr \$PROVIDER_OPTIONS$'
    run 78 "$ODMR" provider --user odmr --accounts "$T/none" --queue "$T" \
        $(recipe /etc/odmr/provider | sed 's/^[A-Z_]*=//')
    run 66 "$ODMR" customer --quiet --poll 600 --secret-file "$T/none" \
        $(recipe /etc/odmr/customer | sed 's/^[A-Z_]*=//')
}

# booted COMMAND...: runs the command in the system that systemd_boots has booted.
booted() { nsenter -t "$INIT" -m -u -i -n -p -C -r -w "$@"; }

# Boots a systemd for this test that has only odmr's units, after make install. It shares this machine's files except
# /etc, /run, /tmp, /usr/local and /var/spool, and has a control group.
systemd_boots() {
    [ -x /lib/systemd/systemd ] || skip 'systemd is not installed'
    needs make systemctl nsenter
    needs_namespaces -mpuinC 'a systemd of its own'
    mkdir "$T/tmp" "$T/cgroups"
    cp -a /etc "$T/etc"
    rm -rf "$T/etc/systemd/system"; mkdir -p "$T/etc/systemd/system"
    trap 'no_longer_booted' EXIT
    # shellcheck disable=SC2016
    unshare -m bash -e -c 'T=$0
        mount -t cgroup2 none "$T/cgroups"
        group=$T/cgroups$(sed -n s/^0:://p /proc/self/cgroup)/odmr-test-$$; mkdir "$group";
        echo $$ > "$group/cgroup.procs"
        exec unshare -mpuinC --fork --kill-child bash -e -c "$2" "$T" "$1"' "$T" "$here" '
        read -r pid _ < /proc/self/stat; echo "$pid" > "$0/init"
        for dir in /run /usr/local /var/spool /usr/lib/systemd/system /usr/lib/systemd/system-generators;
        do mount -t tmpfs none "$dir"; done
        mount --bind "$0/etc" /etc
        make -s -C "$1" install
        for unit in sysinit basic network-online multi-user shutdown;
        do echo "[Unit]" > "/etc/systemd/system/$unit.target"; done
        printf "[Unit]\nDefaultDependencies=no\n" > /etc/systemd/system/odmr-test.target
        mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t cgroup2 none /sys/fs/cgroup
        mount --bind "$0/tmp" /tmp
        cd /; container=odmr-test exec /lib/systemd/systemd --system --unit=odmr-test.target \
            --log-target=console --show-status=no' \
        > "$T/boot.log" 2>&1 &
    BOOT=$!
    until_true eval '! kill -0 "$BOOT" || { INIT=$(< "$T/init") && booted systemctl is-active odmr-test.target; }'
    kill -0 "$BOOT" || skip "systemd does not boot here: $(grep -v 'dmesg(1)' "$T/boot.log" | tail -n 1)"
}

no_longer_booted() {
    kill -9 "$BOOT"; wait 2> /dev/null
    # shellcheck disable=SC2016
    unshare -m bash -c 'mount -t cgroup2 none "$0/cgroups"; group=$(find "$0/cgroups" -type d -name "odmr-test-$1")
        for n in {1..100}; do find "$group" -depth -type d -exec rmdir {} + && break; sleep 0.05;
        done' "$T" "$BOOT" 2> /dev/null
}

# systemctl reload reaches the provider that is no longer root. kill(1) would need a capability for that.
# not with: SANITIZE, OVER_TLS
t_systemd_reloads_the_provider() {
    systemd_boots
    mkdir -p "$T/etc/odmr"
    accounts; mv "$T/accounts" "$T/etc/odmr"
    echo 'odmr:x:64999:64999::/var/spool/odmr:/bin/false' >> "$T/etc/passwd"; echo 'odmr:x:64999:' >> "$T/etc/group"
    chown 64999 "$T/etc/odmr/accounts"
    echo 'PROVIDER_OPTIONS=--name relay.example.net' > "$T/etc/odmr/provider"
    mkdir -p "$T/etc/systemd/system/odmr-provider.service.d"
    printf '[Service]\nStandardError=append:/run/odmr.log\n' > "$T/etc/systemd/system/odmr-provider.service.d/log.conf"
    LOG=/proc/$INIT/root/run/odmr.log
    booted install -d -o odmr /var/spool/odmr
    run 0 booted systemctl start odmr-provider
    until_true counted 2 'listening on .*:366$' "$LOG"
    run 0 booted systemctl reload odmr-provider
    until_true shows "$LOG" 'accounts.* read again|read again'
    echo nonsense >> "$T/etc/odmr/accounts"
    run 0 booted systemctl reload odmr-provider
    until_true shows "$LOG" 'reload failed: .*stay in use'
    run 0 booted systemctl stop odmr-provider
    has "$LOG" 'stopped$'
    equal "$(booted systemctl show -P Result odmr-provider)" success
}

# The provider's unit reloads with all privileges and names only programs of a bare machine. It needs no booted
# systemd.
# not with: SANITIZE, OVER_TLS
t_systemd_unit_reloads_with_privileges() {
    needs make
    run 0 make -s -C "$here" install DESTDIR="$T/root"
    has "$T/root/usr/local/lib/systemd/system/odmr-provider.service" "^ExecReload=+/bin/sh -c 'kill -HUP \$MAINPID'\$"
}

# ---- README and the guide ----------------------------------------------------------------------------

# ids: prints each requirement id in standard input once.
ids() { perl -ne 'print "$1\n" while /(?<![a-z0-9.-])([4-8](?:\.[0-9])*-[a-z])(?![a-z0-9-])/g' | sort -u; }
# named FIELD: prints each name after "code:" or "test:" in RFC2645.txt once.
named() { sed -n "s/^    $1: //p" "$here/RFC2645.txt" | tr ',' '\n' | tr -d ' ' | sort -u; }
# Prints the functions and tables of odmr.c, and the constants of odmr.h and odmr.c.
defined() {
    {
        sed -nE 's/^(__attribute__[^_]* )?[a-z][^[(]*[ *]([a-z_0-9]+)[[(].*[^;]$/\2/p' "$here/odmr.c"
        sed -n 's/^#define \([A-Z_0-9]*\).*/\1/p' "$here/odmr.h" "$here/odmr.c"
    } | sort -u
}

# typed HEADING...: prints README's commands under these headings as a script, and writes the expected output of the
# n-th command to $T/expected.n. README_SHOWN names a file to read instead of README.
typed() {
    perl -e '
        my ($dir, $readme, @wanted) = @ARGV;
        open my $in, "<", $readme or die; local $/; my %section = (split /^(.+)\n=+\n/m, <$in>)[1 .. 1000];
        my ($n, $block) = (0, 0); # of the command; whether its block goes on
        for (map { split /\n/, $section{$_} // die "README has no section $_\n" } @wanted) {
            if (/^    \$ (.*)/) { $n++; $block = 1; print "echo \"\@\@ $n\"\n$1\n" }
            elsif (/^    (.+)/) { if ($block) { open my $out, ">>", "$dir/expected.$n"; print $out "$1\n" } }
            else { $block = 0 }
        }' "$T" "${README_SHOWN:-$here/README}" "$@"
}
# comes_true FILE: checks that each command printed the lines that README shows; "..." is any text.
comes_true() {
    perl -e '
        my ($dir, $said) = @ARGV;
        open my $in, "<", $said or die; local $/; my @said = split /^@@ \d+\n/m, <$in>; my $checked = 0;
        for my $n (1 .. 1000) {
            open my $wanted, "<", "$dir/expected.$n" or next;
            my @lines = split /\n/, $said[$n] // "";
            for my $line (split /\n/, <$wanted>) {
                my $pattern = join ".*", map { quotemeta } split /\.\.\./, $line, -1;
                shift @lines while @lines && $lines[0] !~ /^$pattern$/;
                @lines or die "command $n: README shows \"$line\", but came:\n$said[$n]";
                shift @lines; $checked++;
            }
        }
        $checked or die "nothing was checked\n"' "$T" "$1" || fail 'README is not true'
}
# Makes $T/tree, with links to the files at the top of the source, for commands that start there.
tree() {
    local name
    mkdir -p "$T/tree"
    for name in odmr odmr.c odmr.h Makefile README RFC2645.txt test_odmr.sh build; do
        ln -s "$here/$name" "$T/tree/$name"
    done
    ln -s "$here/.ci" "$T/tree/.ci"
}
# does HEADING...: runs README's commands under these headings in $T/tree, with odmr in the path, and checks the output.
does() {
    local code=0 ports
    tree
    ports=$((2000 + RANDOM % 1100)) # tests run side by side cannot share README's ports
    {
        echo 'trap "kill \$(jobs -p) 2> /dev/null; wait" EXIT'; typed "$@"
    } | sed "s/\b366\([0-9]\)\b/$ports\1/g" > "$T/script"
    sed -i "s/\b366\([0-9]\)\b/$ports\1/g" "$T"/expected.*
    (cd "$T/tree" && PATH="$(dirname "$ODMR"):$PATH" timeout $((PATIENCE * 15)) "${SHELL_FOR_README[@]}" \
        bash "$T/script" > "$T/said" 2>&1) || code=$?
    [ "$code" != 124 ] || { cat "$T/said" >&2; fail "not over after $((PATIENCE * 15)) s"; }
    comes_true "$T/said"
    [ "$code" = 0 ] || [ "$code" = 143 ] || { cat "$T/said" >&2; fail "exit $code"; }
}
SHELL_FOR_README=()

# RFC2645.txt, odmr.c and this file use the same requirements and the same names.
# not with: OVER_TLS
t_guide_names_exist() {
    local guide=$here/RFC2645.txt entry='^  [0-9][0-9.]*-[a-z]  [MNmp]  (provider|customer|both|site)$'
    grep -E "$entry" "$guide" | awk '{ print $1 }' | sort > "$T/ids"
    equal "$(wc -l < "$T/ids")" 38 'entries'
    none 'entries that are there twice' "$(uniq -d "$T/ids")"
    none 'entries without code or test' "$(awk -v entry="$entry" '/^    code: / { code = 1 } /^    test: / { test = 1 }
        $0 ~ entry || /^---/ { if (id && !(code && test)) print id; id = /^---/ ? "" : $1; code = test = 0 }' "$guide")"
    none 'lines that are too long' "$(awk 'length > 80' "$guide")"
    none 'not in odmr.c or odmr.h' "$(named code | comm -23 - <(defined))"
    none 'no such test' "$(named test | comm -23 - <(all_tests | sort))"
    none 'not in the guide' "$(cat "$here"/odmr.[ch] "$here/.ci/torture" "$self" | ids | comm -23 - "$T/ids")"
    none 'not in odmr.c' "$(ids < "$here/odmr.c" | comm -13 - "$T/ids")"
    none 'shown by no test' "$(list_tests | ids | comm -13 - "$T/ids")"
    none 'functions that are there twice' "$(grep -ohE '^[A-Za-z_][A-Za-z0-9_.-]*\(\)' "$self" "$here/.ci/torture" |
        sort | uniq -d)"
}

# The model uses the names of odmr.c and the ids of the guide: its processes, its labels and the functions in its
# comments are functions of odmr.c.
# not with: OVER_TLS
t_model_names_exist() {
    local model=$here/.ci/odmr.pml
    perl -0777 -ne '
        print "$1\n" while /^(?:proctype )?([a-z_]+)(?:: |:$|\()/gm;
        for my $comment (m!/\*(.*?)\*/!gs) { print "$1\n" while $comment =~ /\b([a-z_]+)\(/g }' "$model" |
        grep -vE '^(end_.*|close|flock)$' | sort -u > "$T/names"
    [ "$(wc -l < "$T/names")" -ge 40 ] || fail 'the model names few functions'
    none 'in the model, and not in odmr.c' "$(defined | comm -13 - "$T/names")"
    none 'in the model, and not in the guide' "$(ids < "$model" | comm -23 - <(ids < "$here/RFC2645.txt"))"
    none 'lines over 120 columns' "$(awk 'length > 120 { print FNR }' "$model")"
}

# The checker .ci/legal says if a session keeps to the protocol, and which side departs from it.
# not with: SANITIZE, OVER_TLS
t_legal_finds_what_departs() {
    cat > "$T/trace" << 'END'
[1] -- initial state (RFC 2645, 5.1)
[1] P: 220 example.net on-demand mail relay server ready
[1] C: ATRN
[1] P: 530 Authentication required
[1] C: EHLO example.org
[1] P: 250-example.net
[1] P: 250-AUTH CRAM-MD5
[1] P: 250 ATRN
[1] C: AUTH CRAM-MD5
[1] P: 334 MTg5Ng==
[1] C: ZXhhbXBsZS5vcmc=
[1] P: 235 now authenticated as example.org
[1] -- authenticated state (RFC 2645, 5.2)
[1] C: ATRN example.com
[1] P: 250 OK now reversing the connection
[1] -- reversed state (RFC 2645, 5.3): the provider is now the client
[1] C: 220 example.org ready to receive email
[1] P: EHLO example.net
[1] C: 250-example.org
[1] C: 250-SIZE
[1] C: 250 PIPELINING
[1] P: MAIL FROM:<a@example.edu> SIZE=9
[1] P: RCPT TO:<eva@example.com>
[1] P: DATA
[1] C: 250 OK
[1] C: 250 OK
[1] C: 354 go on
[1] P: ... 9 octets of message ...
[1] P: .
[1] C: 250 OK
[1] P: QUIT
[1] C: 221 bye
END
    run 66 "$here/.ci/legal" "$T/none"
    run 0 "$here/.ci/legal" "$T/trace"
    equal "$(< "$T/out")" '1 sessions, all lawful'
    # is_unlawful SIDE HOW EDIT: checks that .ci/legal blames SIDE, and not its peer, after this edit by sed(1).
    is_unlawful() {
        sed "$3" "$T/trace" > "$T/edited"
        run 1 "$here/.ci/legal" "$T/edited"
        match "$(< "$T/out")" "^[^ ]*:[0-9]+: \\[1\\] $1: ($2)" "$3"
        run 0 "$here/.ci/legal" "--$([ "$1" = provider ] && echo customer || echo provider)" "$T/edited"
    }
    is_unlawful provider '5.2.1-b: ATRN before AUTH is answered 453' 's/530 .*/453 You have no mail/'
    is_unlawful provider '5.1.1-b: EHLO without ATRN' 's/250 ATRN/250 SIZE/'
    is_unlawful provider '5-a: the authenticated state without a 235' 's/235 now/535 not/'
    is_unlawful provider '5.2-a: AUTH succeeds twice' 's/C: ATRN example.com/C: AUTH CRAM-MD5/;s/250 OK now.*/235 OK/'
    is_unlawful provider '7-a: ATRN is answered 550' 's/250 OK now.*/550 no/'
    is_unlawful provider '5-a: the reversed state without a 250' 's/250 OK now.*/450 no/'
    is_unlawful provider '5-a: the reversed state after the reversed' '/-- reversed/p'
    is_unlawful provider '5-a: no reversed state, but another line' '/-- reversed/d'
    is_unlawful provider '5.3-b: a command before the greeting' '/C: 220/{h;d};/P: EHLO/G'
    is_unlawful provider '5.3-c: MAIL before EHLO' '/P: EHLO/d;/C: 250-/d;/PIPELINING/d'
    is_unlawful provider '5.2.1-e: mail for example.org' 's/eva@example.com/eva@example.org/'
    is_unlawful provider 'RFC 2920: RCPT before the last reply' 's/250 PIPELINING/250 HELP/'
    is_unlawful provider 'RFC 5321: content before the reply 354' '/C: 354/{h;d};/P: [.]$/G'
    is_unlawful provider 'RFC 3030: BDAT, and no CHUNKING' 's/P: DATA/P: BDAT 9 LAST/'
    is_unlawful provider 'RFC 5321: a parameter of 8BITMIME' 's/SIZE=9/BODY=8BITMIME/'
    is_unlawful provider 'RFC 5321: DATA without RCPT' '/RCPT/d'
    is_unlawful provider 'RFC 5321: RCPT without MAIL' '/P: MAIL/d'
    is_unlawful provider '4-e: QUIT before the last reply' '/P: [.]$/{n;h;d};/P: QUIT/G'
    is_unlawful provider '5-b: NOOP after QUIT' '/P: QUIT/{p;s/QUIT/NOOP/}'
    is_unlawful provider '5.3-c: TURN, which no SMTP client sends' 's/P: QUIT/P: TURN/'
    is_unlawful customer 'RFC 5321: DATA is answered 250' 's/354 go on/250 OK/'
    is_unlawful customer 'RFC 5321: 354 is no reply to MAIL' '0,/C: 250 OK/s/C: 250 OK/C: 354 OK/'
    is_unlawful customer 'RFC 5321: 250, and no command is without its reply' '/PIPELINING/p'
    is_unlawful customer '5-a: a reply after the end' '/C: 221/p'
    is_unlawful customer 'RFC 5321: that is no reply' 's/C: 354 go on/C: go on/'
    is_unlawful customer 'RFC 5321: a reply of two codes' 's/250-SIZE/251-SIZE/'
    run 64 "$here/.ci/legal" --both
}

# The check of the model fails if the model has an error, a search is not complete, or a mutant breaks nothing.
# not with: SANITIZE, OVER_TLS, BRIEF
t_model_check_can_fail() {
    local model=$here/.ci/odmr.pml
    needs spin cc
    { echo '#define MUTANT_UNLINK_BEFORE_250'; cat "$model"; } > "$T/defect.pml"
    run 1 env MODEL="$T/defect.pml" "$here/.ci/model" window
    has "$T/out" '^FAILED  window: assertion violated'
    has "$T/out" '^0 passed, 1 failed$'
    run 1 env DEPTH=100 "$here/.ci/model" window
    has "$T/out" '^FAILED  window: the search is not complete: '
    sed -e 's/^#ifdef MUTANT_250_BEFORE_FSYNC/#if 0/' -e 's/^#ifndef MUTANT_250_BEFORE_FSYNC/#if 1/' "$model" \
        > "$T/same.pml"
    run 1 env MODEL="$T/same.pml" "$here/.ci/model" 250_before_fsync
    has "$T/out" '^FAILED  250_before_fsync: the mutant lives'
    run 64 "$here/.ci/model" no_such_check
}

# The front page of RFC2645.txt agrees with its entries, and each entry has its labels in order. An entry is marked "no"
# exactly if every judge of it is not_observable. The text is plain US-ASCII within 79 columns.
# not with: OVER_TLS
t_guide_has_its_form() {
    local guide=$here/RFC2645.txt id='[4-8][0-9.]*-[a-z]'
    sed -nE "s/^  ($id)  ([MNmp])  (provider|customer|both|site)\$/\\1 \\2 \\3/p" "$guide" > "$T/entries"
    sed -nE "s/^  ($id) +(MUST NOT|MUST|MAY|prose) +([a-z]+) +(yes|part|no) +[^ ].*/\\1 \\2 \\3/p" "$guide" |
        sed 's/MUST NOT/N/; s/MUST/M/; s/MAY/m/; s/prose/p/' > "$T/front"
    same "$T/front" "$T/entries" 'the front page and the entries'
    equal "$(wc -l < "$T/entries")" 38 'entries'
    none 'wrongly seen from outside' "$(diff \
        <(sed -nE "s/^  ($id) .* no  +[^ ].*/\\1/p" "$guide" | sort) \
        <(sed -nE "s/^judge_(provider|customer)_($id)\\(\\) \{( not_observable)?.*/\\2\\3/p" "$self" | sort |
            awk '{ if ($2) never[$1] = 1; else seen[$1] = 1 } END { for (id in never) if (!seen[id]) print id }' |
            sort))"
    has "$guide" '^This is not the RFC\.'
    has "$guide" '^    https://www\.rfc-editor\.org/rfc/rfc2645$'
    has "$guide" '^    https://www\.rfc-editor\.org/errata/eid404$'
    none 'lines that are too long, or not plain text' "$(grep -nE '.{80}|[^ -~]| $' "$guide")"
    none 'entries that have not their form' "$(awk '
        function over() {
            if (head == "") return
            if (seen !~ ("^ " first " ") || seen !~ / (code )+(test )+$/) print head ": has only" seen
            head = ""
        }
        function begin(labels) {
            over(); head = $1 " " $2; order = " " labels " "; first = substr(labels, 1, index(labels, " ") - 1)
            seen = " "; at = 0
        }
        /^---|^[^ ]/ { over(); next }
        /^  [4-8][0-9.]*-[a-z]  [MNmp]  [a-z]+$/ { begin("rule why unclear here others today limits code test"); next }
        /^  Q[0-9]+  / {
            begin("rfc here why others limits code test")
            if ($1 != "Q" ++questions) print head ": is not the next"
            next
        }
        /^  RFC [0-9]+/ {
            if (!(head ~ /^RFC/ && seen == " ")) begin("rule why unclear here others today limits code test")
            next
        }
        head == "" || /^$/ { next }
        /^    [a-z]+: [^ ]/ {
            label = substr($1, 1, length($1) - 1); n = index(order, " " label " ")
            if (!n) print head ": has no place for " label
            else if (n < at || (n == at && label !~ /^(code|test)$/)) print head ": " label " is out of order"
            at = n; seen = seen label " "
            next
        }
        !/^      [^ ]/ { print head ": line " FNR " is no part of it" }
        END { over(); if (questions != 9) print questions " questions" }' "$guide")"
}

# Makes the manual pages of this program in $T/man, as make install does.
manual_pages() {
    local page dir
    for page in odmr.1 odmr-accounts.5 odmr-queue.5; do
        dir=$T/man/man${page##*.}
        mkdir -p "$dir"
        ODMR=$ODMR "$here/.ci/man" "$here/.ci/$page.in" > "$dir/$page" 2> "$T/err" ||
            fail "$page cannot be made: $(< "$T/err")"
    done
    sed 's/\\-/-/g' "$T"/man/*/* > "$T/pages"
}

# The program has every option, exit code, file, variable and signal of the manual pages. The pages have every option,
# exit code and variable of the program. Examples use options that their command has.
# not with: OVER_TLS
t_manual_pages_are_true() {
    local command words word option
    local -A sysexits=([64]=USAGE [65]=DATAERR [66]=NOINPUT [67]=NOUSER [68]=NOHOST [69]=UNAVAILABLE [70]=SOFTWARE
        [71]=OSERR [73]=CANTCREAT [74]=IOERR [75]=TEMPFAIL [76]=PROTOCOL [77]=NOPERM [78]=CONFIG)
    manual_pages
    for command in $("$ODMR" --help | sed -n 's/^  odmr \([a-z]*\).*/\1/p'); do
        has "$T/pages" "^\\.Ss $command\$"
        "$ODMR" "$command" --help | grep -oE '^ +(-[a-z], )?--[a-z0-9-]+' | grep -oE '[-]+[a-z0-9-]+' \
            > "$T/$command.options"
    done
    equal "$(cat "$T"/*.options | wc -l)" "$(grep -E '^\.It Fl' "$T/pages" | grep -oE 'Fl [a-z-]' | wc -l)" 'options'
    none 'no such option' "$(comm -23 <(grep -oE '\bFl ([A-Za-z]|-[A-Za-z0-9-]+)' "$T/pages" | sed 's/Fl /-/' |
        sort -u) <({ cat "$T"/*.options; printf -- '--help\n--version\n'; } | sort -u))"

    none 'no such exit code' "$(for word in $(sed -n 's/^\.It \([0-9]*\)$/\1/p' "$T/pages" | sort -u); do
        [ "$word" -le 1 ] || grep -q "EX_${sysexits[$word]:-NONE}\\b" "$here/odmr.c" || echo "$word"; done)"
    none 'exit codes that no page has' "$(for word in "${!sysexits[@]}"; do
        ! grep -q "EX_${sysexits[$word]}\\b" "$here/odmr.c" || grep -q "^\\.It $word\$" "$T/pages" || echo "$word"
        done)"
    none 'sysexits unknown to this test' "$(grep -ohE '\bEX_[A-Z]+' "$here/odmr.c" | sort -u | grep -v EX_OK |
        grep -vxE "EX_($(IFS='|'; echo "${sysexits[*]}"))")"

    none 'no such file' "$(sed -n 's/^\.It Pa //p' "$T/pages" | sed 's/ , /\n/' | sed 's/^DIR\/domain\///' |
        sort -u | while read -r word; do
            grep -qF -- "$word" "$here"/odmr.[ch] "$here/Makefile" || echo "$word"
        done)"
    none 'no such variable' "$(grep -oE '\bEv [A-Z_]+' "$T/pages" | sort -u | while read -r _ word; do
        grep -qE "getenv\\(\"$word\"\\)|\\\$\\\$$word\\b" "$here/odmr.c" "$here/Makefile" || echo "$word"; done)"
    none 'variables that no page has' "$(grep -o 'getenv("[A-Z_]*' "$here/odmr.c" | cut -d '"' -f 2 | sort -u |
        while read -r word; do grep -q "^\\.It Ev $word\$" "$T/pages" || echo "$word"; done)"
    none 'no such signal' "$(grep -E '\bDv SIG' "$T/pages" | grep -oE '\bSIG[A-Z0-9]+' | sort -u |
        while read -r word; do grep -q "\\b$word\\b" "$here/odmr.c" || echo "$word"; done)"

    # Lines of examples, joined where a backslash continues them.
    sed -e ':a' -e '/\\e$/{N;s/\\e\n *//;ba' -e '}' "$T/pages" |
        sed -nE 's/^(\.Dl )?[$#] (odmr .*)/\2/p' > "$T/examples"
    [ "$(wc -l < "$T/examples")" -ge 8 ] || fail 'there are fewer examples than there were'
    while read -r _ command words; do
        for word in $words; do
            [[ $word == -* ]] || continue
            grep -qx -e "$word" "$T/$command.options" || fail "example: odmr $command has no option $word"
        done
    done < "$T/examples"
}

# The manual pages have no fault that mandoc finds, no reference to a missing page, and the usual sections.
# not with: OVER_TLS
t_manual_pages_pass_lint() {
    local page
    needs mandoc
    manual_pages
    for page in "$T"/man/*/*; do
        MANPATH=$T/man run 0 mandoc -T lint -W style "$page"
        equal "$(< "$T/out")" ''
        none "sections that ${page##*/} lacks" "$(for section in NAME DESCRIPTION FILES EXAMPLES 'SEE ALSO' STANDARDS \
            'SECURITY CONSIDERATIONS'; do grep -qx ".Sh $section" "$page" || echo "$section"; done)"
    done
    for page in SYNOPSIS COMMANDS SIGNALS ENVIRONMENT 'EXIT STATUS'; do has "$T/man/man1/odmr.1" "^\\.Sh $page\$"; done
}

# odmr.h lists the functions in the order of odmr.c, and no line of either is over 120 columns.
# not with: SANITIZE, OVER_TLS
t_map_is_in_order() {
    none 'in odmr.h, and not there or not in this order in odmr.c' "$(perl -e '
        my ($map, $program) = map { local $/; open my $in, "<", $_ or die; <$in> } @ARGV; my $names = 0;
        $map =~ /Functions, in the order/g or die;
        for my $name ($map =~ /\G.*?^[A-Za-z][^(\n]*[ *]([a-z_0-9]+)\(/gms) {
            $names++;
            $program =~ /^[A-Za-z][^;\n]*[ *]$name\(.*[^;\n]$/gm or print("$name\n"), last;
        }
        $names > 60 or print "only $names prototypes were found\n"' "$here/odmr.h" "$here/odmr.c")"
    none 'lines over 120 columns' "$(awk 'length > 120 { print FILENAME ":" FNR }' "$here"/odmr.[ch])"
}

# odmr.c has the protocol first, in the order of time, and the parts that odmr.h lists, each with its entry functions.
# The id of each reply to ATRN is found first in the line that sends it.
# not with: SANITIZE, OVER_TLS
t_program_is_in_the_order_of_the_protocol() {
    none 'not where a reader looks for it' "$(perl -e '
        my ($map, $program) = map { local $/; open my $in, "<", $_ or die; <$in> } @ARGV;
        my ($line, $part, %at, %in, %replied) = (0, 0);
        for (split /\n/, $program) {
            $line++;
            if (/^\/\* ==== (\d+)\. /) {
                print "part $1 behind part $part\n" if $1 != $part && $1 != $part + 1;
                $part = $1;
            }
            ($at{$1}, $in{$1}) = ($line, $part) if /^[a-z][^;(]*[ *]([a-z_0-9]+)\([^;]*$/;
            for my $id (grep { !$replied{$_} } /\b(5\.2\.1-[bfgjkl])\b/g) {
                $replied{$id} = 1;
                /\breply(_bad_command)?\(s, "$id"/ or print "$id stands first in line $line, which sends no reply\n";
            }
        }
        print "not all replies to ATRN were found\n" unless 6 == keys %replied;
        print "$part parts\n" if $part != 15;
        my %before = (initial_state => 200, authenticated_state => 200, reversed_state => 200, atrn_command => 500,
            send_mail => 950, client_dialogue => 1350, hello_command => 1900, mail_command => 1900,
            rcpt_command => 1900, data_command => 1900, bdat_command => 1900);
        for (sort keys %before) {
            print "$_ in line $at{$_}\n" unless $at{$_} && $at{$_} < $before{$_};
        }
        my $listed = 0;
        while ($map =~ /^ \* +(\d+)  \S.*?  +([a-z_]+(?:[,;] [a-z_]+)*)$/gm) {
            $listed++;
            for my $name (split /[,;] /, $2) {
                print "$name is not in part $1\n" unless ($in{$name} // 0) == $1;
            }
        }
        print "$listed parts are listed\n" if $listed != 15;' "$here/odmr.h" "$here/odmr.c")"
}

# In the parts of odmr.c that support the protocol, no function calls a function that comes later in its part.
# not with: SANITIZE, OVER_TLS
t_supporting_parts_are_callee_first() {
    none 'calls of what comes later' "$(perl -0777 -e '
        my ($program) = <>;
        $program =~ s!/\*.*?\*/|\x27(?:\\.|[^\\])\x27|"(?:\\.|[^"\\])*"!
            my $text = $&; $text =~ /^.. ==== (\d+)\./ ? "\@$1\n" : ""!gse;
        $program =~ s!__attribute__\(\(\w+(?:\([^()]*\))?\)\)!!g;
        my ($part, $n, %part, %place, %body) = (0, 0);
        while ($program =~ /^\@(\d+)$|^[A-Za-z_][^;{}#]*?\b(\w+)\([^;{}]*\)\n\{\n(.*?)^\}$/gms) {
            if (defined $1) { $part = $1; next }
            print "$2 was read twice\n" if exists $part{$2};
            ($part{$2}, $place{$2}, $body{$2}) = ($part, $n++, $3);
        }
        $n > 400 && $part == 15 or print "only $n functions in $part parts were found\n";
        for my $caller (grep { $part{$_} > 5 } sort keys %body) {
            $part{$caller} == ($part{$_} // 0) && $place{$caller} < $place{$_} and print "$caller calls $_\n"
                for $body{$caller} =~ /\w+/g;
        }' "$here/odmr.c")"
}

# README's commands of "TLS and the mechanisms" have the results that README shows.
# not with: OVER_TLS
t_readme_tls_and_the_mechanisms() {
    needs openssl
    does 'TLS and the mechanisms'
}

# README's commands of "Judging another implementation" have the results that README shows.
# not with: SANITIZE, OVER_TLS
t_readme_judging_another_implementation() {
    needs socat
    does 'Judging another implementation'
}

# The judge's rows for fetchmail are as README says: none fails, but fetchmail gives up on ATRN when its own time-out is
# over. fetchmail's mail goes to smtp-sink.
# not with: SANITIZE, OVER_TLS
t_readme_what_the_judge_says_of_others() {
    needs fetchmail smtp-sink
    needs_judge
    sink
    cat > "$T/fetch" << END
umask 77; cd "\$ODMR_SCRATCH"
cat > rc << RC
poll \$ODMR_HOST with proto odmr service \$ODMR_PORT auth cram-md5 \${PATIENT_FOR:+timeout \$PATIENT_FOR}:
    user "\$ODMR_USER" password "\$ODMR_SECRET" fetchdomains \$(echo \$ODMR_DOMAINS | tr , ' ') smtphost 127.0.0.1/$SINK
RC
FETCHMAILHOME=. exec fetchmail -f rc --pidfile pid --nosyslog
END
    run_judge 0 --customer "sh $T/fetch" --atrn-wait 2
    has "$T/out" '1 pass, 0 fail, 1 not observable. Prose: 13 pass, 0 fail, 2 not observable'
    has "$T/out" '^5\.1\.2-f .*EXTERNAL alone was on offer, and it said "AUTH CRAM-MD5"$'
    run_judge 1 --customer "PATIENT_FOR=5 sh $T/fetch" --atrn-wait 15 --only 5.2.1-c
    has "$T/out" '^5\.2\.1-c  MUST      fail           ATRN had no answer yet, and after .* s came: the end of the'
    echo 'poll localhost with proto odmr: user a' > "$T/rc"; chmod 600 "$T/rc"
    run 0 fetchmail -f "$T/rc" -V
    has "$T/out" 'timeout is 300 seconds (default)'
}

# README's experiments have the results that README shows. They use the shell and the certificates of "TLS and the
# mechanisms". Without tshark, or the privilege to capture, the tenth is left out.
# not with: SANITIZE, OVER_TLS
t_readme_experiments() {
    local README_SHOWN=$here/README
    needs openssl cc
    lacking_capabilities NET_RAW
    if [ -n "$LACKING" ] || ! type -P tshark > /dev/null; then
        sed '/^10\. See /,/^11\. /d' "$here/README" > "$T/README"
        README_SHOWN=$T/README
    fi
    does 'TLS and the mechanisms' 'Experiments'
}

# README's commands of "The model" have the results that README shows.
# not with: SANITIZE, OVER_TLS, BRIEF
t_readme_the_model() {
    needs spin cc make
    does 'The model'
}

# README's commands of "Proof that nothing is lost" have the results that README shows.
# not with: OVER_TLS
t_readme_proof_that_nothing_is_lost() {
    does 'Proof that nothing is lost'
}

# README's commands for a provider, a customer and their administrator have the results that README shows. They run as
# root with their own users, /etc, /usr/local, /var and network.
# not with: SANITIZE, OVER_TLS
t_readme_provider_and_customer() {
    needs adduser runuser
    needs_namespaces -mn 'another /etc, /usr/local, /var and network'
    cp -a /etc "$T/etc"
    SHELL_FOR_README=(unshare -mn bash -c 'mount --bind "$0/etc" /etc && mount -t tmpfs none /usr/local &&
        mount -t tmpfs none /var/spool && mount -t tmpfs none /var/log &&
        perl -e '"'"'socket S, 2, 2, 0; $up = pack "a16sx14", "lo", 1;
        ioctl S, 0x8914, $up or die $!'"'"' && PATH=/usr/local/bin:$PATH exec "$@"' "$T")
    does 'A provider' 'A customer' 'Operating it'
}

# ---- The suite itself --------------------------------------------------------------------------------

# An ignored signal or standard input could change these tests: they wait for signals, or give a program no input.
SENSITIVE=(t_demo_interrupted t_sigterm_while_waiting t_sighup_reads_accounts_again t_account)

same_result() {
    timeout $((PATIENCE * 4)) "$@" > "$T/out" 2>&1 || { cat "$T/out" >&2; fail "not as always: $*"; }
    equal "$(tr -d '\r' < "$T/out" | grep -E '^(ok|skipped) ' | sort)" "$(< "$T/usual")" "$*"
}

# The suite gives the same result under nohup, with signals ignored, with a silent standard input, and in the
# background of a terminal.
# not with: SANITIZE, OVER_TLS, BRIEF
t_suite_wherever_it_is_started() {
    local idle
    run 0 "$self" "${SENSITIVE[@]}"
    grep -E '^(ok|skipped) ' "$T/out" | sort > "$T/usual"
    equal "$(wc -l < "$T/usual")" ${#SENSITIVE[@]}
    same_result nohup "$self" "${SENSITIVE[@]}"
    ( trap '' INT HUP TERM CHLD PIPE QUIT USR1; same_result "$self" "${SENSITIVE[@]}" ) || exit 1
    exec {idle}<> <(:)
    same_result "$self" "${SENSITIVE[@]}" <&"$idle"
    needs unbuffer
    # shellcheck disable=SC2016
    same_result unbuffer bash -ic '"$0" "$@" & wait $!' "$self" "${SENSITIVE[@]}"
}

# On a machine with only the demo's packages, the suite names the missing programs and skips the tests that need them.
# not with: SANITIZE, OVER_TLS
t_suite_says_what_is_missing() {
    local name start=$SECONDS
    mkdir "$T/bin"
    ln -s /usr/bin/* "$T/bin"
    for name in openssl socat unbuffer faketime; do rm -f "$T/bin/$name"; done
    rm "$T/bin/perl"
    printf '#!/bin/sh\ncase $* in *-MDigest*) exit 2 ;; esac\nexec /usr/bin/perl "$@"\n' > "$T/bin/perl"
    chmod 755 "$T/bin/perl"
    unset OVER_TLS # over TLS each of these tests needs openssl
    PATIENCE=200 PATH=$T/bin run 0 "$self" t_bad_arguments t_scram_by_hand t_plain_by_hand \
        t_sighup_reads_certificates_again \
        t_readme_experiments t_customer_quiet_and_progress t_demo
    equal "$(grep -c '^not installed: ' "$T/out")" 1
    match "$(head -n 1 "$T/out")" '^not installed: openssl, socat, .*unbuffer, faketime,.* perl.s Digest::MD5; '
    match "$(head -n 1 "$T/out")" "perl's Digest::MD5; what needs them is skipped \\(README, \"Run the tests\""
    has "$T/out" '^ok .*t_demo$'
    has "$T/out" "^skipped t_scram_by_hand: perl's Digest::MD5 is not installed\$"
    has "$T/out" '^skipped t_sighup_reads_certificates_again: openssl is not installed$'
    has "$T/out" '^skipped t_readme_experiments: openssl is not installed$'
    has "$T/out" '^1 passed, 0 failed, 6 skipped$'
    [ $((SECONDS - start)) -lt 150 ] || fail 'a test waited for something that is missing'
    has "$here/README" '^Run the tests'
}

# A test that fails prints the expected dialogue beside the one that it saw, and the lines not yet reached.
# not with: SANITIZE, OVER_TLS
t_suite_prints_the_dialogue_that_failed() {
    provider
    ! ( dialogue_on_a_new_connection ) 2> "$T/report" <<'END' || fail 'it did not fail'
P: 220 *
C: NOOP
P: 354 *
C: QUIT
END
    has "$T/report" '^FAILED: not what was expected: P: 354 \*$'
    has "$T/report" '^  P: 220 \*  *P: 220 example.net on-demand mail relay server ready$'
    has "$T/report" '^> P: 354 \*  *P: 250 OK$'
    has "$T/report" '^  C: QUIT$'
    ! ( dial; ask NOOP '^250 ' ) 2> "$T/report" || fail 'it did not fail'
    has "$T/report" '^> P: (like ^250 )  *P: 220 example.net '
}

# After a test, the suite checks that its traces show only what the protocol allows our provider and our customer.
# not with: SANITIZE, OVER_TLS
t_suite_checks_the_traces_of_each_test() {
    local where
    put_letter one 1.a a@example.edu eva@example.org
    provider
    customer 0 "127.0.0.1:$PORT"
    hasnt "$T/err" '^\[1\] '
    stop_provider
    mkdir "$T/provider" "$T/customer"
    sed 's/ P: 250 OK now .*/ P: 550 no/' "$LOG" > "$T/provider/provider0.log"
    sed 's/ C: 221 / C: 354 /' "$T"/.customer.* > "$T/customer/.customer.1"
    for where in provider customer; do
        ! ( T=$T/$where lawful_sessions ) 2> "$T/$where/report" || fail "a $where that departs is not found"
    done
    has "$T/provider/report" '\[1\] provider: 7-a: ATRN is answered 550$'
    has "$T/customer/report" '\[1\] customer: RFC 5321: 354 is no reply to QUIT$'
    ( lawful_sessions ) 2> "$T/report" || fail 'the traces are not as they should be'
    has "$T/report" '^2 sessions, all lawful$'
}

# --help prints the head of this file, and an argument that names no test is reported.
# not with: SANITIZE, OVER_TLS
t_suite_help() {
    run 0 "$self" --help
    equal "$(head -n 1 "$T/out")" 'The test suite of odmr.'
    has "$T/out" '^  ./test_odmr.sh --torture '
    hasnt "$T/out" '^set -u'
    run 64 "$self" t_no_such_test
}

# If one thing is missing, make names it and prints the compiler's message.
# not with: SANITIZE, OVER_TLS
t_make_says_what_is_missing() {
    local headers
    needs make
    mkdir -p "$T/src" "$T/bin" "$T/headers"
    ln -s "$here/Makefile" "$here"/odmr.[ch] "$T/src"
    makes() {
        local PATH=$T/bin:$PATH; run 2 make -C "$T/src" CC="$1"; equal "$(grep -c '^odmr cannot be built: ' "$T/err")" 1
        has "$T/err" "$2"
    }
    makes no-such-compiler 'there is no C compiler no-such-compiler: apt-get install gcc libc6-dev$'
    makes 'cc -nostdinc' \
        'cc -nostdinc does not find the headers of the C library (.*stdio.h.*): apt-get install libc6-dev$'
    echo > "$T/headers/stdio.h"
    makes "cc -nostdinc -I$T/headers" \
        'does not find the headers of OpenSSL (.*openssl/ssl.h.*), though cc does: it needs an OpenSSL for its own'
    printf '#!/bin/sh\nexec %s -nostdinc -I%s "$@"\n' "$(command -v cc)" "$T/headers" > "$T/bin/cc"
    chmod 755 "$T/bin/cc"
    makes cc 'the headers of OpenSSL are missing (.*openssl/ssl.h.*): apt-get install libssl-dev$'
    mkdir "$T/headers/openssl"; echo '#define OPENSSL_VERSION_NUMBER 0x10101000L' > "$T/headers/openssl/ssl.h"
    makes cc 'the headers of OpenSSL are older than version 3$'
}

# make turns on the protections that the compiler knows, and no flag of the site causes a warning.
# not with: SANITIZE, OVER_TLS
t_make_hardens_what_it_makes() {
    local flag
    needs make
    mkdir -p "$T/src" "$T/bin"
    ln -s "$here/Makefile" "$here"/odmr.[ch] "$T/src"
    run 0 make -C "$T/src" CFLAGS=-O1 CPPFLAGS=-D_FORTIFY_SOURCE=2 LDFLAGS=-Wl,-s
    equal "$(cat "$T/err")" ''
    for flag in -fstack-protector-strong -fPIE -Werror=format-security; do has "$T/out" " $flag "; done
    for flag in -fstack-clash-protection -fcf-protection '-U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=3'; do
        cc -O1 -Werror $flag -fsyntax-only -xc /dev/null 2> /dev/null || continue
        has "$T/out" " $flag "
    done
    printf '#!/bin/sh\ncase $* in *-fcf-protection*|*=3*) exit 1;; esac; exec %s "$@"\n' "$(command -v cc)" \
        > "$T/bin/older"
    chmod 755 "$T/bin/older"
    PATH=$T/bin:$PATH run 0 make -n -C "$T/src" CC=older
    has "$T/out" ' -fPIE -fstack-clash-protection  *-U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=2 -o odmr '
}

# make bench with a hundredth of the work prints a figure in each row, and a ratio in each row that compares two.
# not with: SANITIZE, OVER_TLS, BRIEF
t_bench_prints_its_table() {
    needs smtp-sink make
    run 0 make -s -C "$here" bench SCALE=100
    equal "$(cat "$T/err")" ''
    equal "$(grep -cE ' +[0-9.]+ s +[0-9.]+ s +[0-9]+\.[0-9]{2} ' "$T/out")" 7 'rows that compare'
    local row='^([0-9]+ messages, 200 ms: round trips|polls a second|memory of|reply to ATRN|first octet)'
    equal "$(grep -cE "$row.* [0-9]+\\.?[0-9]*" "$T/out")" 9 'other rows'
}

# The suite has these headings in this order, and each test is under the heading of the number in its name. Under a
# heading the letters of the requirements ascend. The comment above a test begins with a sentence that says what must
# hold. The judge calls only its own functions.
# not with: SANITIZE, OVER_TLS
t_suite_is_in_order() {
    grep '^# ---- ' "$self" | sed -e 's/^# ---- //' -e 's/ -*$//' > "$T/headings"
    same - "$T/headings" << 'END'
Helpers: what every test may use
A provider, with one account for two domains
The protocol by hand, over bash's /dev/tcp
The customer's part by hand: an SMTP server in bash, after ATRN
A scripted provider, for the customer under test
TLS, and SCRAM by hand
Receivers that the customer hands the session on to
RFC 2645, 4: Description
RFC 2645, 5: States
RFC 2645, 5.1: Initial State
RFC 2645, 5.1.1: EHLO
RFC 2645, 5.1.2: AUTH
RFC 2645, 5.2: Authenticated State
RFC 2645, 5.2.1: ATRN
RFC 2645, 5.3: Reversed State
RFC 2645, 5.4: Other Commands
RFC 2645, 6: Example On-Demand Mail Relay Session
RFC 2645, 7: Response Codes
RFC 2645, 8: Security Considerations
RFC 5321: SMTP
RFC 4954: AUTH, and the SASL mechanisms
RFC 3207: STARTTLS
RFC 2920: PIPELINING
RFC 3030: CHUNKING
RFC 1870: SIZE
RFC 6152: 8BITMIME
RFC 6531: SMTPUTF8
RFC 3461 to 3464: failure notices
RFC 9422: LIMITS
Maildir
The program: options
The program: the queue
The program: the log
The program: services
The program: the accounts
The program: hostile peers
The program: faults
Real peers
README and the guide
The suite itself
Judging another implementation
Judging: TLS and SASL
Judging a provider: our side of the dialogue
Judging a provider: the rows
Judging a customer: the scripted provider
Judging a customer: the rows
Judging: one row, and the report
The judge, judged
The runner
END
    none 'tests under a heading that is not theirs, or out of order' "$(awk '
        /^# ---- / { heading = $0; last = "" }
        /^t_[^ ]*\(\) \{$/ {
            name = substr($0, 3, index($0, "(") - 3); wanted = "# ---- (RFC |The |Maildir|Real|README)"
            if (match(name, /^[4-8][0-9.]*-[a-z]_/)) {
                id = substr(name, 1, RLENGTH - 1); wanted = "^# ---- RFC 2645, " substr(id, 1, length(id) - 2) ": "
                gsub(/\./, "[.]", wanted)
                if (id < last) print name
                last = id
            } else if (match(name, /^[0-9][0-9][0-9][0-9]_/)) {
                wanted = "^# ---- RFC ([0-9]+ to )?" substr(name, 1, 4) ": "
            }
            if (heading !~ wanted) print name
        }' "$self")"
    none 'variables in capitals that the list above the helpers does not name' "$(comm -13 \
        <(sed -n '/^# What functions pass/,/^$/s/^#   \([A-Z_ ]*\).*/\1/p' "$self" | tr ' ' '\n' | sort -u) \
        <(sed '/^# ---- RFC 2645, 4:/q' "$self" | grep -oE '(^|[ ;(])[A-Z][A-Z_]+(\[[^]]*\])?\+?=' | tr -d ' ;(+=' |
            sed 's/\[.*//' | grep -vxE 'IFS|PATH|LC_ALL|ODMR_SECRET|FAIL.*' | sort -u))"
    none 'tests without a comment that begins with a sentence, and under an RFC with its clause' "$(awk '
        /^# ---- / { heading = $0; text = "" }
        /^# ---- Judging another/ { exit } # a part with rules of its own
        /^# (shows|not with): / { next }
        /^# / { text = text substr($0, 2); next }
        /^t_[^ ]*\(\) \{$/ {
            if (text !~ /^ ([A-Z0-9<-]|odmr[. ]|make |fetchmail |swaks |systemctl ).*[.]$/ ||
                (heading ~ /# ---- RFC/ && text !~ /RFC [0-9]+/)) print substr($0, 1, index($0, "(") - 1)
        }
        { text = "" }' "$self")"
    none 'rows of the judge that call what fails a test' "$(awk '
        /^# ---- / { rows = /^# ---- Judging a (provider|customer): the rows/ }
        /^judge_/ { row = $1 }
        rows && /(^|[;!|&{] ) *(if |while )?(say|hear|ask|expect|dial|login|turn|take_mail|hang_up|closed)( |;|$)/ {
            print row
        }' "$self")"
    none 'lines over 120 columns' \
        "$(awk 'length > 120 { print FILENAME ":" FNR }' "$self" "$here/Makefile" "$here/.ci"/*)"
}

# ---- Judging another implementation --------------------------------------------------------------------
#
# RFC2645.txt lists the requirements, the side that each binds, and its level. A requirement of the provider or its site
# has a function judge_provider_ID, one of the customer judge_customer_ID, and one of both sides has both (but see
# judged_here). Each function is a row of the report. A row has its own shell, scratch directory and connections, so a
# program that hangs or closes in one row does not affect the next. A row ends with a verdict on the judged program:
#
#   passes [TEXT]         it keeps the requirement; TEXT says what it chose, if it has a choice
#   departs TEXT          it was seen to break the requirement
#   not_observable TEXT   the judge cannot see the answer, or another event prevented it
#
# A row sends and reads with functions whose names begin with judge_. Functions of the same name without judge_ belong
# to the tests, where a mismatch fails the test. In the judge the name says what a mismatch means:
#
#   judge_ask LINE CODES        the row departs, because it judges this reply
#   judge_get_past LINE CODES   the row is not observable, because it judges something after this reply
#   judge_try LINE CODES        the function is false and the row goes on, as with all judge_try functions
#
# For judge_login, judge_turn and other parts of a session, too, a mismatch means not observable. Names without judge_
# are the verdicts, and questions about the judged program (offers, notified).
#
# The judge applies the standard and does not compare with our own program. The text after a code, the lines of a reply,
# and the case and order of keywords are free, and a 421 may come at any time. SMTP lets a reply take minutes, so
# silence for PATIENCE seconds is not observable.

verdict() {
    local expected=
    if [ "$1" = fail ] && [ -n "${EXPECTED:-}" ]; then
        expected=${EXPECTED//|/ or } expected=${expected//../xx}
        printed "$expected"
        expected=$PRINTED
    fi
    printed "$2"
    [ -e "$T/verdict" ] || printf '%s\t%s\t%s\n' "$1" "${PRINTED:-.}" "$expected" > "$T/verdict" # the first counts
    exit 0
}
# record MARK LINE: adds a line to the row's file of --transcript.
record() {
    [ -n "${JUDGE_TRANSCRIPT:-}" ] || return 0
    printed "$2"
    printf '%s %s\n' "$1" "$PRINTED" >> "$T/transcript"
}
passes() { verdict pass "${1:-}"; }
departs() { verdict fail "$1"; }
not_observable() { verdict 'not observable' "$1"; }
# printed TEXT: sets PRINTED to one line of printable ASCII with the first 160 octets of a peer's text. Other octets are
# written as \xNN.
printed() {
    PRINTED=${1:0:160}
    [[ $PRINTED != *[!\ -~]* && $PRINTED != *\\* ]] ||
        PRINTED=$(printf '%s' "$PRINTED" | perl -pe 's/([^ -\[\]-~])/sprintf "\\x%02x", ord $1/ge')
}

# judge_hear: reads one line into HEARD. False if the connection has ended. DEADLINE ends the row of a peer that sends
# without end.
judge_hear() {
    local code=0
    [ "$SECONDS" -lt "$DEADLINE" ] || not_observable "it took longer than $((PATIENCE * 6)) s"
    IFS= read -r -n 16384 -t "$PATIENCE" HEARD <&"$LINE" || code=$?
    [ "$code" -le 128 ] || not_observable "silent for $PATIENCE s after ${SAID:-it was connected}"
    [ "$code" = 0 ] || return 1
    [ "${HEARD%$'\r'}" != "$HEARD" ] || WITHOUT_CR=$HEARD
    HEARD=${HEARD%$'\r'}
    record '<' "$HEARD"
}
# judge_silent SECONDS: true if no octet came in that time. Otherwise HEARD is the line that came, or "the end of the
# connection".
judge_silent() {
    local code=0
    IFS= read -r -n 400 -t "$1" HEARD <&"$LINE" || code=$?
    [ "$code" -le 128 ] || return 0
    HEARD=${HEARD%$'\r'}
    [ "$code" = 0 ] || HEARD='the end of the connection'
    return 1
}
# judge_read_reply: reads a whole reply into ANSWER, its code into CODE and the texts after the code into LINES. CODE is
# "closed" if the connection has ended, and "malformed" if the lines are no reply.
judge_read_reply() {
    CODE='' ANSWER='' LINES=()
    while [ ${#LINES[@]} -lt 200 ]; do
        judge_hear || { CODE=closed ANSWER='the connection was closed'; return; }
        ANSWER+=${ANSWER:+ / }$HEARD
        if ! [[ $HEARD =~ ^[2-5][0-5][0-9]([ -]|$) && ( -z $CODE || $CODE == "${HEARD:0:3}" ) ]]; then break; fi
        CODE=${HEARD:0:3}
        LINES+=("${HEARD:4}")
        [[ $HEARD == ???-* ]] || return
    done
    CODE=malformed
}
judge_say() { SAID="\"$1\""; judge_write "$1"; }
judge_write() { record '>' "$1"; say "$1" 2> /dev/null; }
# If a row departs, the report prints EXPECTED.
judge_try() { judge_say "$1"; judge_read_reply; EXPECTED=$2; if [[ $CODE =~ ^($2)$ ]]; then EXPECTED=; else false; fi; }
judge_ask() {
    judge_try "$@" && return
    [ "$CODE" != 421 ] || not_observable "$SAID: $ANSWER"
    departs "$SAID: $ANSWER"
}
judge_get_past() { judge_try "$@" || not_observable "cannot get past $SAID: $ANSWER"; }
# judge_closed: the row departs unless the peer closes the connection.
judge_closed() {
    judge_silent "$PATIENCE" && departs "after $SAID the connection stayed open for $PATIENCE s"
    [ "$HEARD" = 'the end of the connection' ] || departs "after $SAID came: $HEARD"
}
# base64_text TEXT: true if TEXT is base64. Blanks at its end are left to row 6-a.
base64_text() { without_blanks "$1"; [[ $TEXT =~ ^[A-Za-z0-9+/]*={0,2}$ && $((${#TEXT} % 4)) = 0 ]]; }
without_blanks() { TEXT=$1; while [[ $TEXT == *[[:blank:]] ]]; do TEXT=${TEXT%?}; done; }

# ---- Judging: TLS and SASL ----
#
# openssl s_client carries the dialogue inside TLS, over a pipe in each direction. s_client itself sends STARTTLS, and
# EHLO before it. JUDGE_TLS is clear, starttls or tls. For a customer, socat is the server's end of TLS.

# judge_dial HOW: opens a connection and sets LINE. Over TLS it also sets LINE_OUT, for the other direction, and
# TLS_KEYS, the file of the TLS secrets.
judge_dial() {
    local address=$JUDGE_HOST:$JUDGE_PORT how=(-quiet -no_ign_eof -nocommands) pipe
    trap '' PIPE # a write to a closed connection must not end the judge
    SAID='' LINE_OUT=''
    record -- "connected, $1"
    if [ "$1" = clear ]; then
        { exec {LINE}<> "/dev/tcp/$JUDGE_HOST/$JUDGE_PORT"; } 2> /dev/null ||
            not_observable 'it could not be connected to'
        return
    fi
    [[ $JUDGE_HOST != *:* ]] || address="[$JUDGE_HOST]:$JUDGE_PORT"
    LINES_OPENED=$((${LINES_OPENED:-0} + 1))
    pipe=$T/line.$LINES_OPENED TLS_KEYS=$T/keys.$LINES_OPENED
    [ "$1" = tls ] || how+=(-starttls smtp -name "$FIRST")
    if [ -z "$JUDGE_INSECURE" ]; then
        how+=(-verify_return_error)
        if [[ $JUDGE_HOST == *:* || $JUDGE_HOST =~ ^[0-9.]+$ ]]; then how+=(-verify_ip "$JUDGE_HOST")
        else how+=(-verify_hostname "$JUDGE_HOST"); fi
    fi
    [ -z "$JUDGE_CA" ] || how+=(-CAfile "$JUDGE_CA")
    [ -z "$JUDGE_CERT" ] || how+=(-cert "$JUDGE_CERT" -key "$JUDGE_KEY")
    mkfifo "$pipe"
    exec {LINE_OUT}<> "$pipe"
    exec {LINE}< <(exec openssl s_client -connect "$address" -keylogfile "$TLS_KEYS" "${how[@]}" < "$pipe" \
        2> "$pipe.log" {LINE_OUT}>&-)
    LINE_PID=$!
    STARTED+=("$LINE_PID")
}
judge_hang_up() {
    exec {LINE}>&-
    [ -z "${LINE_OUT:-}" ] || exec {LINE_OUT}>&-
    LINE_OUT=
}
# judge_cut: ends the connection without TLS's close.
judge_cut() {
    [ -z "$LINE_OUT" ] || kill -9 "$LINE_PID"
    judge_hang_up
}
# judge_start_tls: replies to STARTTLS and starts TLS on the connection. The dialogue continues through a new socat.
judge_start_tls() {
    local log=$T/upgrade.$BASHPID pipe=$T/upgrade.$BASHPID.in line=$LINE
    mkfifo "$pipe"
    : > "$log"
    exec {LINE_OUT}<> "$pipe"
    exec {LINE}< <(exec socat -d -d "OPENSSL-LISTEN:0,bind=127.0.0.1,cert=$T/server.pem,${CLIENTS:-verify=0}" STDIO \
        < "$pipe" 2> "$log" {LINE_OUT}>&- >&1)
    STARTED+=($!)
    until_true listens "$log"
    printf '220 go on\r\n' >&1
    socat STDIO "TCP:127.0.0.1:${PORTS[0]}" <&"$line" >&1 2> /dev/null {LINE_OUT}>&- &
    exec {line}<&- >&- < /dev/null
}

# judge_cram_response CHALLENGE [SECRET]: sets RESPONSE to the response of CRAM-MD5 to a challenge.
judge_cram_response() {
    judge_secret "${@:2}"
    cram_response "$JUDGE_USER" "$SECRET" "$1"
}
# judge_secret [SECRET]: sets SECRET to the argument, or else to the account's secret.
judge_secret() {
    SECRET=${1-}
    if [ $# = 0 ]; then
        [ -n "$JUDGE_SECRET_FILE" ] || not_observable 'there is no --secret-file'
        IFS= read -r SECRET < "$JUDGE_SECRET_FILE"
        SECRET=${SECRET%$'\r'}
    fi
}
# tls_exporter: sets BINDING to the channel binding of RFC 9266, in base64, from the secret that s_client wrote to
# TLS_KEYS (RFC 8446, 7.5).
tls_exporter() {
    BINDING=$(perl -MDigest::SHA=sha256,sha384,hmac_sha256,hmac_sha384 -MMIME::Base64 -ne '
        /^EXPORTER_SECRET \w+ (\w+)/ or next;
        my $secret = pack "H*", $1; my $long = length $secret == 48;
        sub expand { my ($key, $label, $n) = @_; $label = "tls13 $label";
            my $info = pack("n C/a C/a", $n, $label, $long ? sha384("") : sha256("")) . "\1";
            return substr $long ? hmac_sha384($info, $key) : hmac_sha256($info, $key), 0, $n }
        print encode_base64(expand(expand($secret, "EXPORTER-Channel-Binding", length $secret), "exporter", 32), "");
        last' "$TLS_KEYS")
    [ -n "$BINDING" ] || not_observable 'without TLS 1.3 the judge has no channel binding'
}
# as_base64 TEXT [BASE64], from_base64 BASE64: set TEXT to the encoded or decoded text, without NUL octets.
as_base64() { compute encode "$@"; TEXT=$COMPUTED; }
from_base64() { compute decode "$1"; TEXT=$COMPUTED; }

# judge_try_response CODES [SECRET]: responds to the challenge in ANSWER by JUDGE_MECHANISM, with the right secret or
# the given one. EXTERNAL has no secret, so it sends a wrong name instead of a wrong secret.
judge_try_response() {
    case $JUDGE_MECHANISM in
    CRAM-MD5) judge_cram_response "${ANSWER#334 }" "${@:2}" ;;
    PLAIN) judge_secret "${@:2}"; RESPONSE=$(printf '\0%s\0%s' "$JUDGE_USER" "$SECRET" | base64 -w 0) ;;
    EXTERNAL) RESPONSE=; [ $# = 1 ] || { as_base64 "not-$JUDGE_USER"; RESPONSE=$TEXT; } ;;
    SCRAM-*) judge_try_scram "$@"; return ;;
    esac
    record '>' "(the response to $JUDGE_MECHANISM)"
    say "$RESPONSE" 2> /dev/null
    SAID="the response to $JUDGE_MECHANISM"
    judge_read_reply
    EXPECTED=$1
    if [[ $CODE =~ ^($1)$ ]]; then EXPECTED=; else false; fi
}
judge_try_scram() {
    local header=n,, nonce=$RANDOM$RANDOM$RANDOM$RANDOM bare first final name
    name=${JUDGE_USER//=/=3D} name=${name//,/=2C} BINDING='' EXPECTED=$1 SAID="the response to $JUDGE_MECHANISM"
    judge_secret "${@:2}"
    bare=n=$name,r=$nonce
    if [ "$JUDGE_MECHANISM" = SCRAM-SHA-256-PLUS ]; then header=p=tls-exporter,,; tls_exporter; fi
    as_base64 "$header$bare"
    judge_write "$TEXT"
    judge_read_reply
    [ "$CODE" = 334 ] || { [[ $CODE =~ ^($1)$ ]]; return; }
    from_base64 "${ANSWER#334 }"
    first=$TEXT
    [[ $first =~ ^r=($nonce[^,]+),s=[A-Za-z0-9+/=]+,i=[0-9]+ ]] ||
        { CODE=malformed ANSWER="SCRAM's challenge: $first"; return 1; }
    nonce=${BASH_REMATCH[1]}
    as_base64 "$header" "$BINDING"
    final=c=$TEXT,r=$nonce
    scram "$SECRET" "$bare" "$first" "$final"
    as_base64 "$final,p=$PROOF_OF_IT"
    judge_write "$TEXT"
    judge_read_reply
    if [ "$CODE" = 334 ]; then
        from_base64 "${ANSWER#334 }"
        [[ $# = 2 || $TEXT == "v=$SIGNATURE"* ]] ||
            { CODE=malformed ANSWER="a wrong server signature: $TEXT"; return 1; }
        judge_write ''
        judge_read_reply
    fi
    [[ $CODE =~ ^($1)$ ]]
}

# ---- Judging a provider: our side of the dialogue ----

# judge_connect: connects and reads the greeting. With STARTTLS, s_client does not pass the greeting on.
judge_connect() {
    judge_dial "$JUDGE_TLS"
    if [ "$JUDGE_TLS" = starttls ]; then CODE=220 ANSWER='220'; else judge_read_reply; fi
}
judge_open_session() {
    judge_connect
    [ "$CODE" = 220 ] || not_observable "no greeting: $ANSWER"
    judge_get_past "EHLO $FIRST" 250
    EHLO=("${LINES[@]:1}")
}
judge_login() {
    judge_open_session
    judge_get_past "AUTH $JUDGE_MECHANISM" 334
    judge_try_response 235 || not_observable "cannot log in by $JUDGE_MECHANISM: $ANSWER"
}
# judge_learn_channel: writes the kind of TLS and the mechanism to JUDGE_DIR/channel. STARTTLS is used if it is offered
# and the judge cannot log in without it. PLAIN is used in the clear only by request.
judge_learn_channel() {
    local wanted=$JUDGE_MECHANISM
    DEADLINE=$((SECONDS + PATIENCE))
    judge_try_session || return 0
    if [ "$JUDGE_TLS" = clear ] && offers STARTTLS &&
        ! { judge_choose_mechanism && judge_try "AUTH $JUDGE_MECHANISM" 334; }; then
        judge_hang_up
        JUDGE_MECHANISM=$wanted
        JUDGE_TLS=starttls
        judge_try_session || { tls_complaint; return 0; }
    fi
    judge_choose_mechanism || JUDGE_MECHANISM=${wanted:-CRAM-MD5}
    echo "$JUDGE_TLS $JUDGE_MECHANISM" > "$JUDGE_DIR/channel"
}
tls_complaint() {
    { grep -h -m 1 'verify error' "$T"/line.*.log || tail -q -n 1 "$T"/line.*.log; } > "$JUDGE_DIR/tls.failed"
}
judge_try_session() { judge_connect; [ "$CODE" = 220 ] && judge_try "EHLO $FIRST" 250 && EHLO=("${LINES[@]:1}"); }
judge_choose_mechanism() {
    local name
    offers AUTH || return 1
    for name in ${JUDGE_MECHANISM:-CRAM-MD5 SCRAM-SHA-256 EXTERNAL PLAIN}; do
        [[ " ${PARAMETERS^^} " == *" $name "* ]] || continue
        [ "$name" != EXTERNAL ] || [ -n "$JUDGE_CERT" ] || continue
        [ "$name$JUDGE_TLS$JUDGE_MECHANISM" != PLAINclear ] || continue
        JUDGE_MECHANISM=$name
        return 0
    done
    return 1
}
# offers KEYWORD: true if the EHLO response has this keyword. Sets PARAMETERS to the words after the keyword.
offers() {
    local line
    for line in "${EHLO[@]}"; do
        PARAMETERS=${line#* }
        [ "$PARAMETERS" != "$line" ] || PARAMETERS=
        line=${line%% *}
        [ "${line^^}" != "$1" ] || return 0
    done
    return 1
}
# The replies to an ATRN that the provider knows and allows, with or without mail.
ATRN_CODES='250|450|451|453'

# judge_inject DOMAIN...: queues, by the command of --inject, a message for judge at each domain that this run can
# recognize. Its text is BODY, or else a text with dots.
judge_inject() {
    local recipients=("${@/#/judge@}")
    MESSAGE_ID=$JUDGE_TOKEN.$RANDOM$RANDOM
    [ -n "$JUDGE_INJECT" ] || not_observable 'no mail waits: there is no --inject'
    printf '%s\n' 'From: judge@example.edu' "To: judge@$1" "Subject: $JUDGE_TOKEN" \
        'Date: Mon, 1 Jan 2024 09:00:00 +0000' \
        "Message-ID: <$MESSAGE_ID@example.edu>" '' \
        "${BODY:-$'A line.\n.a dot before it\n.\nThe end.'}" > "$T/letter"
    ODMR_SENDER=judge@example.edu ODMR_RECIPIENT=judge@$1 ODMR_RECIPIENTS="${recipients[*]}" ODMR_DOMAIN=$1 \
        timeout -k 1 "$PATIENCE" sh -c "$JUDGE_INJECT" < "$T/letter" > "$T/inject.log" 2>&1 ||
        not_observable "--inject failed: $(tail -n 1 "$T/inject.log")"
}
# judge_try_atrn CODES: sends ATRN without domains in a row that judges something else. If the provider refuses, all
# later calls send ATRN FIRST. Row 5.2.1-d reports the refusal, and the head of the report mentions it.
judge_try_atrn() {
    if [ ! -s "$JUDGE_DIR/bare" ]; then
        if judge_try ATRN "$1"; then return 0; fi
        [[ $CODE == 5* ]] || return 1
        printf '%s\n' "$ANSWER" > "$JUDGE_DIR/bare"
        judge_hang_up # the provider may close after a failure
        judge_login
    fi
    judge_try "ATRN $FIRST" "$1"
}
# judge_try_turn [DOMAINS]: true if the reply to ATRN is 250. Injected mail may need time to reach the queue, so 451 and
# 453 repeat ATRN until PATIENCE is over. The provider may require an interval between two requests (5.2.1-i), so 450
# does, too, but only in the first row.
judge_try_turn() {
    local try
    for ((try = 0; try < PATIENCE; try++)); do
        if [ -n "${1:-}" ]; then judge_try "ATRN $1" 250 && return; else judge_try_atrn 250 && return; fi
        [[ $CODE == 45[013] ]] || break
        [ "$CODE" != 450 ] || [ ! -e "$JUDGE_DIR/too_soon" ] || break
        sleep 1
    done
    if [ "$CODE" = 450 ]; then : > "$JUDGE_DIR/too_soon"; fi
    return 1
}
judge_turn() { judge_try_turn "$@" || not_observable "mail waits, but $SAID: $ANSWER"; }

# judge_take_mail: plays the server in the reversed state, without extensions, until QUIT or the end of the connection.
# The reply to a message of this run is OURS, or else 250. Any other message is deferred, so it stays queued. The
# results:
#   COMMANDS                the verbs in their order
#   RECIPIENTS ASKED        the recipients of this run's messages; those of all messages
#   TAKEN OTHERS            the number of this run's messages; the number of others
#   TEXTS                   the text of each of this run's messages
# A row may set:
#   ON_RCPT                 the reply to RCPT
#   CUT_AT                  the number of lines of content after which the connection ends
#   HOLDING RESUMING        returns before the reply to the first message; sends that reply and continues
judge_take_mail() {
    local recipients=
    COMMANDS='' RECIPIENTS='' ASKED='' TAKEN=0 OTHERS=0 TEXTS=()
    if [ -n "${RESUMING:-}" ]; then judge_say '250 OK'; else judge_say "220 $FIRST ready"; fi
    while judge_hear; do
        COMMANDS+=${COMMANDS:+ }${HEARD%% *}
        case ${HEARD^^} in
        EHLO\ * | HELO\ *) judge_say "250 $FIRST" ;;
        MAIL\ FROM:*) recipients=; judge_say '250 OK' ;;
        RCPT\ TO:*) recipients+=" ${HEARD#*:}"; ASKED+=" ${HEARD#*:}"; judge_say "${ON_RCPT:-250 OK}" ;;
        DATA) if [ -n "${ON_RCPT:-}" ]; then judge_say '554 no valid recipients'
            else judge_say '354 go on'; judge_take_content "$recipients" || return 0; fi ;;
        RSET | NOOP*) judge_say '250 OK' ;;
        QUIT) judge_say '221 closing'; return ;;
        *) judge_say '502 not known here' ;;
        esac
        [ "${#COMMANDS}" -lt 10000 ] || not_observable 'it does not come to an end'
    done
}
judge_take_content() {
    local content='' lines=0
    while judge_hear && [ "$HEARD" != . ]; do
        [ ${#content} -gt 100000 ] || content+=$HEARD$'\n'
        lines=$((lines + 1))
        [ "$lines" != "${CUT_AT:-}" ] || { judge_cut; return 1; }
    done
    if [[ $content == *"$JUDGE_TOKEN"* ]]; then
        TAKEN=$((TAKEN + 1)) RECIPIENTS+=$1 TEXT_OF_OURS=${content#*$'\n\n'}
        TEXTS+=("$TEXT_OF_OURS")
        [ -z "${HOLDING:-}" ] || return 1
        judge_say "${OURS:-250 OK}"
    else
        OTHERS=$((OTHERS + 1))
        judge_say '451 only what the judge has sent is taken'
    fi
}
# in_domains ADDRESS...: true if each is in one of the account's domains. Otherwise ADDRESS is the first that is not.
in_domains() {
    local domain
    for ADDRESS; do
        domain=${ADDRESS##*@} domain=${domain%%>*}
        [[ ,${JUDGE_DOMAINS,,}, == *",${domain,,},"* ]] || return 1
    done
}
# judge_fetch [DOMAINS]: plays a whole session, in which mail of this run must come.
judge_fetch() {
    judge_login
    judge_turn "$@"
    judge_take_mail
    judge_hang_up
    [ "$TAKEN" -gt 0 ] || not_observable "after 250 came no mail of this run: ${COMMANDS:-nothing}"
}
# judge_try_turn_at_once: like judge_try_turn, but does not wait for mail.
judge_try_turn_at_once() {
    local try
    for ((try = 0; try < PATIENCE; try++)); do
        judge_try_atrn 250 && return
        [ "$CODE" = 450 ] && [ ! -e "$JUDGE_DIR/too_soon" ] || break
        sleep 1
    done
    if [ "$CODE" = 450 ]; then : > "$JUDGE_DIR/too_soon"; fi
    return 1
}
# judge_empty_queue: takes the mail that earlier rows of this run left. CODE and ANSWER have the last reply to ATRN.
judge_empty_queue() {
    local try
    for try in 1 2 3; do
        judge_login
        judge_try_turn_at_once || return 0
        judge_take_mail
        judge_hang_up
        [ "$TAKEN" -gt 0 ] || return 0
    done
}

# ---- Judging a provider: the rows ----

judge_provider_4-a() {
    [ "$JUDGE_PORT" != 366 ] || passes
    not_observable "the port was given as $JUDGE_PORT; its default port is not seen"
}
judge_provider_4-b() {
    judge_inject "$FIRST"
    judge_login
    judge_turn
    judge_take_mail
    [[ ${COMMANDS^^} =~ ^(EHLO|HELO)\  ]] ||
        departs "after 250 and a greeting came: ${COMMANDS:-the end of the connection}"
    passes
}
# judge_initial_commands: EHLO and AUTH in a session, QUIT in the next one, which stays open.
judge_initial_commands() {
    judge_connect
    judge_ask "EHLO $FIRST" 250
    judge_ask "AUTH $JUDGE_MECHANISM" '334|504|538'
    judge_hang_up
    judge_connect
    judge_ask QUIT 221
}
judge_provider_4-c() {
    judge_initial_commands
    judge_hang_up
    judge_login
    judge_try_atrn "$ATRN_CODES" || departs "$SAID: $ANSWER"
    passes
}
judge_provider_4-d() {
    judge_login
    judge_inject "$FIRST"
    judge_silent 1 || departs "nobody asked, and came: $HEARD"
    not_observable \
        'it kept quiet for 1 s with mail waiting and a customer logged in; a longer interval was not watched'
}
judge_provider_4-e() {
    local OURS='451 not now'
    judge_inject "$FIRST"
    judge_fetch
    OURS='250 OK'
    judge_login
    judge_try_turn || departs "a message that was put off with 451 $(was_returned): $ANSWER"
    judge_take_mail
    [ "$TAKEN" -gt 0 ] || departs "a message that was put off with 451 $(was_returned): ${COMMANDS:-nothing}"
    passes 'what was put off with 451 came again; a notice to the sender of what is refused is not seen'
}
# was_returned: prints what happened to a message that does not come again, as far as --notice-dir shows.
was_returned() {
    if notified; then echo 'was returned to its sender instead of kept'
    else echo 'did not come again'; fi
}
# A notice has the header of the message that it is about.
notified() { [ -n "$JUDGE_NOTICE_DIR" ] && grep -rqF -e "$MESSAGE_ID" "$JUDGE_NOTICE_DIR"; }
# judge_inject_many N: queues N messages. The text of each has its number, and lines that a careless sender changes.
judge_inject_many() {
    local n BODY
    SENT=()
    for ((n = 1; n <= $1; n++)); do
        text_of "$n"
        judge_inject "$FIRST"
        SENT+=("$BODY")
    done
}
text_of() {
    BODY="Message $1 of this row."$'\n\n..two dots\n.one\n\ta tab and blanks at the end  \n.\nend'
}
# judge_compare: sets DIFFERENCE, unless each message of SENT is in ALL once, in the form in which it is sent.
judge_compare() {
    local n text count wire
    DIFFERENCE=
    for ((n = 1; n <= ${#SENT[@]}; n++)); do
        wire=$'\n'${SENT[n - 1]}$'\n' wire=${wire//$'\n.'/$'\n..'} wire=${wire#$'\n'} count=0
        for text in "${ALL[@]}"; do
            [[ $text == "Message $n of this row."* ]] || continue
            count=$((count + 1))
            [ "$text" = "$wire" ] || DIFFERENCE+="${DIFFERENCE:+, }message $n came out changed"
        done
        [ "$count" = 1 ] || DIFFERENCE+="${DIFFERENCE:+, }message $n came $count times"
    done
}
judge_provider_4-e2() {
    local ALL=()
    judge_empty_queue
    judge_inject_many 4
    judge_login
    judge_turn
    judge_take_mail
    judge_hang_up
    ALL=("${TEXTS[@]}")
    EXPECTED='4 messages in one session, each once and unchanged'
    judge_compare
    [ "$TAKEN" -gt 0 ] || not_observable "after 250 came no mail of this run: ${COMMANDS:-nothing}"
    [ "$TAKEN" -ge 4 ] || departs "a session brought $TAKEN of 4 messages: $DIFFERENCE"
    [ -z "$DIFFERENCE" ] || departs "$DIFFERENCE"
    passes
}
judge_provider_4-e3() {
    local JUDGE_INSECURE=1
    [ "$JUDGE_TLS" = clear ] || passes '4-e2 was inside TLS'
    judge_open_session
    offers STARTTLS || not_observable 'STARTTLS is not offered'
    judge_hang_up
    JUDGE_TLS=starttls
    judge_provider_4-e2
}
judge_provider_4-e4() {
    local ALL=() one
    judge_empty_queue
    judge_inject_many 4
    judge_login
    judge_turn
    HOLDING=1 judge_take_mail
    ALL+=("${TEXTS[@]}")
    suspend_line one
    judge_login
    judge_try_atrn "$ATRN_CODES" || departs "the second session, $SAID: $ANSWER"
    if [ "$CODE" = 250 ]; then judge_take_mail; ALL+=("${TEXTS[@]}"); fi
    judge_hang_up
    resume_line one
    RESUMING=1 judge_take_mail
    ALL+=("${TEXTS[@]}")
    judge_hang_up
    if [ ${#ALL[@]} -lt 4 ]; then
        judge_login
        ! judge_try_turn || { judge_take_mail; ALL+=("${TEXTS[@]}"); }
        judge_hang_up
    fi
    EXPECTED='each of 4 messages once'
    judge_compare
    [ -z "$DIFFERENCE" ] || departs "$DIFFERENCE"
    passes
}
# suspend_line NAME, resume_line NAME: save a connection and return to it, for a row with more than one.
suspend_line() { printf -v "$1" '%s %s %s' "${LINE:-}" "${LINE_OUT:-}" "${LINE_PID:-}"; }
resume_line() {
    local words=${!1}
    LINE=${words%% *} words=${words#* } LINE_OUT=${words%% *} LINE_PID=${words#* }
}
judge_provider_4-e5() {
    local ALL=() SENT=() BODY CUT_AT='' line
    judge_empty_queue
    text_of 1
    for line in {1..300}; do BODY+=$'\n'"line $line of a longer message that the connection does not outlive"; done
    SENT=("$BODY")
    judge_inject "$FIRST"
    judge_login
    judge_turn
    CUT_AT=50
    judge_take_mail
    CUT_AT=
    judge_login
    judge_try_turn ||
        departs "after the connection was cut in the middle of a message, the message $(was_returned): $ANSWER"
    judge_take_mail
    judge_hang_up
    ALL=("${TEXTS[@]}")
    EXPECTED='the message comes whole in the next session'
    judge_compare
    [ -z "$DIFFERENCE" ] || departs "after the connection was cut in the middle of a message: $DIFFERENCE"
    passes
}
judge_provider_4-e6() {
    local ON_RCPT='550 5.1.1 no such user' BODY="Refused $RANDOM$RANDOM" try
    [ -n "$JUDGE_NOTICE_DIR" ] || not_observable 'a notice cannot be seen without --notice-dir'
    judge_empty_queue
    judge_inject "$FIRST"
    judge_login
    judge_turn
    judge_take_mail
    judge_hang_up
    [ -n "$ASKED" ] || not_observable "after 250 came no recipient: ${COMMANDS:-nothing}"
    for ((try = 0; try < PATIENCE; try++)); do
        ! notified || passes
        sleep 1
    done
    EXPECTED='a notice to the sender'
    departs "a recipient was refused with 550, and no notice came within $PATIENCE s"
}
judge_provider_5-a() {
    judge_open_session
    judge_get_past "AUTH $JUDGE_MECHANISM" 334
    if ! judge_try_response closed 'a wrong secret'; then
        [ "$CODE" != 235 ] || departs 'a wrong secret: 235'
        judge_ask ATRN '5..|421|closed'
        [[ $CODE != 5* ]] || judge_ask QUIT '221|421|closed'
        [ "$CODE" != 221 ] || judge_closed
    fi
    judge_hang_up
    judge_login
    judge_ask QUIT 221
    judge_closed
    passes
}
judge_provider_5-b() {
    judge_inject "$FIRST"
    judge_fetch
    [[ ${COMMANDS^^} == *\ QUIT ]] || departs "it closed the connection without QUIT, after $COMMANDS"
    passes
}
judge_provider_5.1-a() {
    judge_initial_commands
    passes
}
judge_provider_5.1.1-a() {
    local line
    WITHOUT_CR=
    if [ "$JUDGE_TLS" = starttls ]; then
        judge_dial clear
        judge_read_reply
        [ "$CODE" = 220 ] || departs "greeting: $ANSWER"
        judge_ask "EHLO $FIRST" 250
        judge_hang_up
    fi
    judge_connect
    [ "$CODE" = 220 ] || departs "greeting: $ANSWER"
    judge_ask "EHLO $FIRST" 250
    [ -z "$WITHOUT_CR" ] || departs "a line ends in LF without CR: $WITHOUT_CR"
    for line in "${LINES[@]:1}"; do
        [[ $line =~ ^[A-Za-z0-9][A-Za-z0-9-]*([ =].*)?$ ]] || departs "no keyword of EHLO: $line"
    done
    passes
}
judge_provider_5.1.1-b() {
    local missing=
    judge_open_session
    offers AUTH || missing=AUTH
    offers ATRN || missing+="${missing:+ and }ATRN"
    [ -z "$missing" ] || departs "not in the response to EHLO: $missing$(offers STARTTLS && echo ', but STARTTLS is')"
    passes
}
judge_provider_5.1.2-a() {
    judge_open_session
    judge_get_past "AUTH $JUDGE_MECHANISM" 334
    base64_text "${ANSWER:4}" || departs "the challenge is not base64: $ANSWER"
    judge_ask '*' 501
    judge_hang_up # because the provider may close after a failure
    judge_open_session
    judge_get_past "AUTH $JUDGE_MECHANISM" 334
    judge_ask 'that is no base64!' 501
    judge_hang_up
    judge_open_session
    judge_ask 'AUTH X-NO-SUCH-MECHANISM' 504
    judge_hang_up
    judge_open_session
    judge_get_past "AUTH $JUDGE_MECHANISM" 334
    judge_try_response 235 || departs "$SAID: $ANSWER"
    passes
}
judge_provider_5.1.2-b() {
    judge_open_session
    judge_get_past "AUTH $JUDGE_MECHANISM" 334
    ! judge_try_response 235 'a wrong secret' || departs 'a wrong secret: 235'
    if [[ $CODE == 5* ]]; then judge_ask ATRN '5..|421|closed'; fi
    judge_hang_up
    judge_login
    judge_try_atrn "$ATRN_CODES" || departs "$SAID: $ANSWER"
    passes 'ATRN is refused after a failed AUTH, not after 235; the moment in between is not seen'
}
judge_provider_5.1.2-c() {
    judge_open_session
    if ! offers AUTH || [[ " ${PARAMETERS^^} " != *' CRAM-MD5 '* ]]; then
        offers AUTH || not_observable 'EHLO does not list AUTH: see 5.1.1-b'
        [ -z "$PARAMETERS" ] ||
            not_observable "not offered, but $PARAMETERS is: a site's choice, maybe (5.1.2-e)"
        departs 'no mechanism is offered'
    fi
    local JUDGE_MECHANISM=CRAM-MD5
    judge_ask 'AUTH CRAM-MD5' 334
    judge_try_response 235 || departs "the right response: $ANSWER"
    passes
}
judge_provider_5.1.2-d() {
    judge_open_session
    offers AUTH || not_observable 'EHLO does not list AUTH'
    local -A where=([clear]='in the clear' [starttls]='after STARTTLS' [tls]='inside TLS')
    passes "offered ${where[$JUDGE_TLS]}: ${PARAMETERS:-nothing}"
}
judge_provider_5.1.2-e() {
    judge_open_session
    offers AUTH || not_observable 'EHLO does not list AUTH'
    if [[ " ${PARAMETERS^^} " == *' CRAM-MD5 '* ]]; then passes 'CRAM-MD5 is on'; fi
    passes 'CRAM-MD5 is off'
}
judge_provider_5.1.2-f() {
    judge_open_session
    if offers AUTH && [[ " ${PARAMETERS^^} " == *' EXTERNAL '* ]]; then passes 'offered'; fi
    [ -z "$JUDGE_CERT" ] || not_observable 'not offered, though the judge has shown a certificate'
    not_observable 'not offered where no certificate has shown who the customer is'
}
judge_provider_5.1.3-a() {
    judge_open_session
    judge_ask QUIT 221
    judge_closed
    passes
}
judge_provider_5.2-a() {
    judge_login
    judge_try_atrn "$ATRN_CODES" || departs "$SAID: $ANSWER"
    judge_hang_up
    judge_login
    judge_ask QUIT 221
    passes
}
judge_provider_5.2.1-a() {
    local list
    judge_login
    judge_try_atrn "$ATRN_CODES" || departs "$SAID: $ANSWER"
    judge_hang_up
    for list in "$FIRST" "$JUDGE_DOMAINS"; do
        judge_login
        judge_ask "ATRN${list:+ $list}" "$ATRN_CODES"
        judge_hang_up
    done
    passes
}
judge_provider_5.2.1-b() {
    judge_open_session
    judge_ask ATRN 530
    judge_hang_up
    judge_open_session
    judge_ask "ATRN $FIRST" 530
    passes
}
judge_provider_5.2.1-d() {
    local domain
    for domain in ${JUDGE_DOMAINS//,/ }; do judge_inject "$domain"; done
    judge_login
    judge_turn
    [ ! -s "$JUDGE_DIR/bare" ] || departs "\"ATRN\": $(< "$JUDGE_DIR/bare")"
    judge_take_mail
    judge_hang_up
    [ "$TAKEN" -gt 0 ] || not_observable "after 250 came no mail of this run: ${COMMANDS:-nothing}"
    for domain in ${JUDGE_DOMAINS//,/ }; do
        [[ ${RECIPIENTS,,} == *"@${domain,,}>"* ]] || departs "ATRN without domains did not bring the mail for $domain"
    done
    passes
}
judge_provider_5.2.1-e() {
    local list OURS='451 not now'
    judge_inject "$FIRST"
    for list in "$FIRST,$JUDGE_FOREIGN" "$JUDGE_FOREIGN,$FIRST"; do
        judge_login
        if judge_try "ATRN $list" 250; then
            judge_take_mail
            [ "$TAKEN$OTHERS" = 00 ] || departs "\"ATRN $list\" brought mail"
        fi
        judge_hang_up
    done
    OURS='250 OK'
    judge_fetch "$FIRST" # the message was there all the time
    passes
}
# The account has a message before and one after the foreign one, so in any order the foreign one follows another.
judge_provider_5.2.1-e2() {
    local recipients
    judge_empty_queue
    judge_inject "$FIRST"
    judge_inject "$FIRST" "$JUDGE_FOREIGN"
    judge_inject "$FIRST"
    judge_login
    judge_turn
    judge_take_mail
    judge_hang_up
    read -r -a recipients <<< "$ASKED"
    EXPECTED="no recipient but those in $JUDGE_DOMAINS"
    in_domains "${recipients[@]}" || departs "the account of $JUDGE_DOMAINS was sent mail for $ADDRESS"
    [ "$TAKEN" -gt 1 ] || not_observable "of 3 messages came $TAKEN in this session: ${COMMANDS:-nothing}"
    passes
}
judge_provider_5.2.1-e3() {
    local OURS='451 not now' recipients others
    [ -n "$JUDGE_OTHER_USER" ] || not_observable 'there is no --other-user'
    [ "$JUDGE_MECHANISM" != EXTERNAL ] || not_observable 'with EXTERNAL there is one certificate, for one account'
    judge_inject "$JUDGE_FOREIGN"
    others=$MESSAGE_ID
    JUDGE_USER=$JUDGE_OTHER_USER JUDGE_SECRET_FILE=$JUDGE_OTHER_SECRET judge_login
    judge_turn "$JUDGE_FOREIGN"
    judge_take_mail
    judge_hang_up
    [ "$TAKEN" -gt 0 ] || not_observable "the other account got no mail: ${COMMANDS:-nothing}"
    OURS='250 OK'
    judge_inject "$FIRST"
    judge_login
    judge_turn
    judge_take_mail
    judge_hang_up
    read -r -a recipients <<< "$ASKED"
    EXPECTED="no recipient but those in $JUDGE_DOMAINS"
    in_domains "${recipients[@]}" ||
        departs "the account of $JUDGE_DOMAINS was sent what another had deferred: $ADDRESS"
    JUDGE_USER=$JUDGE_OTHER_USER JUDGE_SECRET_FILE=$JUDGE_OTHER_SECRET judge_login
    MESSAGE_ID=$others
    judge_try_turn "$JUDGE_FOREIGN" || departs "what the other account had deferred $(was_returned): $ANSWER"
    judge_take_mail
    passes
}
judge_provider_5.2.1-f() {
    local list
    for list in "$FIRST,$JUDGE_FOREIGN" "$JUDGE_FOREIGN,$FIRST" "$JUDGE_FOREIGN"; do
        judge_login
        judge_ask "ATRN $list" 450
        judge_hang_up
    done
    passes
}
judge_provider_5.2.1-g() {
    judge_empty_queue
    case $CODE in
    453) passes ;;
    250) no_mail_after_250 || not_observable 'other mail is waiting'
         passes '250, then QUIT (5.2.1-h)' ;;
    45[01] | 421) not_observable "$SAID: $ANSWER" ;;
    esac
    departs "$SAID: $ANSWER"
}
# no_mail_after_250: the row departs unless 250 led to EHLO and QUIT in judge_empty_queue. False if other mail waits.
no_mail_after_250() {
    [ "$OTHERS" = 0 ] || return 1
    [[ ${COMMANDS^^} =~ ^(EHLO|HELO)\ QUIT$ ]] ||
        departs "after 250 and without mail came: ${COMMANDS:-the end of the connection}"
}
judge_provider_5.2.1-h() {
    judge_empty_queue
    [ "$CODE" = 453 ] && passes 'no mail: 453'
    [ "$CODE" = 250 ] || not_observable "$SAID: $ANSWER"
    no_mail_after_250 || not_observable 'other mail is waiting'
    passes 'no mail: 250, then QUIT after EHLO'
}
# The first session keeps the mail that it has claimed until the second has its reply.
judge_provider_5.2.1-h2() {
    local one first
    judge_empty_queue
    judge_inject "$FIRST"
    judge_login
    judge_turn
    suspend_line one
    judge_login
    judge_try_atrn "$ATRN_CODES" || departs "while another session has the mail, $SAID: $ANSWER"
    first=$CODE
    if [ "$CODE" = 250 ]; then
        judge_take_mail
        EXPECTED='EHLO or HELO, then QUIT'
        [[ ${COMMANDS^^} =~ ^(EHLO|HELO)\  ]] ||
            departs "another session has the mail, and after 250 came: ${COMMANDS:-the end of the connection}"
    fi
    judge_hang_up
    resume_line one
    judge_take_mail
    judge_hang_up
    passes "while another session has the mail: $first"
}
judge_provider_5.2.1-i() {
    judge_login
    judge_get_past "ATRN $FIRST" "$ATRN_CODES"
    judge_hang_up
    judge_login
    judge_ask "ATRN $FIRST" "$ATRN_CODES"
    if [ "$CODE" = 450 ]; then passes 'the second ATRN in a row: 450'; fi
    passes "the second ATRN in a row: $CODE"
}
judge_provider_5.2.1-j() {
    judge_inject "$FIRST"
    judge_login
    judge_try_turn "$JUDGE_DOMAINS" ||
        { [ "$CODE" != 450 ] || not_observable "$SAID: $ANSWER"; departs "mail waits, and $SAID: $ANSWER"; }
    judge_take_mail
    passes
}
judge_provider_5.2.1-k() { not_observable 'the judge cannot make the check of access fail'; }
judge_provider_5.2.1-l() {
    local list seen='' wrong=''
    CODE=
    for list in "$FIRST," "$FIRST, $FIRST" "$FIRST $FIRST" ",$FIRST" localhost "-${FIRST}" "$FIRST/x"; do
        [[ $CODE =~ ^(450|451|5..)$ ]] || judge_login
        judge_try "ATRN $list" '450|451|5..' || [[ $CODE =~ ^(421|closed)$ ]] || wrong+="${wrong:+, }$SAID: $CODE"
        seen+="${seen:+, }$SAID: $CODE"
        if [ "$CODE" = 250 ]; then judge_hang_up; fi
    done
    judge_hang_up
    EXPECTED='450, 451 or 5xx to each of the malformed lists'
    [ -z "$wrong" ] || departs "$wrong"
    judge_login
    judge_try "atrn a-b.1.$JUDGE_FOREIGN" 450 ||
        not_observable "$SAID: $ANSWER; 5.2.1-f judges the reply to a foreign domain"
    judge_ask "ATRN ${FIRST^^}" '250|450|451|453'
    passes "$seen"
}
judge_provider_5.3-a() {
    judge_inject "$FIRST"
    judge_login
    judge_turn
    judge_silent 1 || departs "before the customer's greeting came: $HEARD"
    judge_take_mail
    [ -n "$COMMANDS" ] || departs 'after the greeting it closed the connection'
    passes
}
judge_provider_5.3-c() {
    judge_inject "$FIRST"
    judge_fetch
    [[ ${COMMANDS^^} =~ ^(EHLO|HELO)\  ]] || departs "after the greeting came: $COMMANDS"
    [[ ${RECIPIENTS,,} == *"<judge@${FIRST,,}>"* ]] || departs "the recipient judge@$FIRST has become$RECIPIENTS"
    [ "$TEXT_OF_OURS" = $'A line.\n..a dot before it\n..\nThe end.\n' ] ||
        departs 'the text of a message came out changed, or its dots were not doubled'
    passes
}
judge_provider_5.4-a() {
    local command seen=
    judge_open_session
    for command in NOOP VRFY 'MAIL FROM:<>' TURN FROBNICATE; do
        judge_try "$command" ... || true
        seen+="${seen:+, }${command%% *} $CODE"
        [ "$CODE" != closed ] || break
    done
    passes "$seen"
}
judge_provider_6-a() {
    judge_open_session
    judge_get_past "AUTH $JUDGE_MECHANISM" 334
    [[ $ANSWER =~ ^334\ ?$ || $ANSWER != *[[:blank:]] ]] || departs 'the base64 of its challenge has a blank behind it'
    judge_hang_up
    judge_inject "$FIRST"
    judge_fetch
    [[ " ${COMMANDS^^} " =~ ^\ (EHLO|HELO)\ .*MAIL\ RCPT\ .*QUIT\ $ ]] ||
        departs "the commands of the reversed session: $COMMANDS"
    passes
}
judge_provider_7-a() {
    judge_open_session
    judge_try ATRN 530 || not_observable "$SAID: $ANSWER: see 5.2.1-b"
    judge_hang_up
    judge_login
    judge_try "ATRN $JUDGE_FOREIGN" 450 || not_observable "$SAID: $ANSWER: see 5.2.1-f"
    judge_hang_up
    judge_empty_queue
    EXPECTED='530 only before the log-in'
    [ "$CODE" != 530 ] || departs "after the log-in, $SAID: $ANSWER"
    [[ $CODE =~ ^($ATRN_CODES)$ ]] || not_observable "$SAID: $ANSWER: see 5.2.1-g"
    passes "530, 450 and $CODE were seen, each in its place"
}
judge_provider_8-a() { not_observable 'this is one address, and others are not tried'; }
judge_provider_8-b() {
    judge_open_session
    offers AUTH || not_observable 'EHLO does not list AUTH: see 5.1.1-b'
    judge_ask 'AUTH X-NO-SUCH-MECHANISM' '[45]..|closed'
    passes
}

# ---- Judging a customer: the scripted provider ----
#
# Here the function of a row plays the provider, once for each connection. If a row needs two runs of the customer, the
# first scene ends with next_scene.

JUDGE_CHALLENGE=PDE4OTYuNjk3MTcwOTUyQGp1ZGdlLmV4YW1wbGU+ # <1896.697170952@judge.example>

next_scene() { : > "$T/scene.$SCENE"; exit 0; }

# judge_try_until_atrn: plays the provider until ATRN has come after the log-in; sets ATRN. False if the customer has
# left before; WENT says after what. The EHLO response lists MECHANISMS. CHOSEN is the first AUTH command and RESPONSE
# the last response. VERDICT_ON_AUTH, if set, is the reply even to a right response.
judge_try_until_atrn() {
    local lines
    trap '' PIPE
    DEADLINE=$((SECONDS + PATIENCE * 6))
    : > "$T/connected"
    record -- connected
    CHOSEN='' RESPONSE='' WENT='it was connected' LOGGED_IN='' UNTIL_TLS=
    [ "$JUDGE_TLS" != starttls ] || UNTIL_TLS=1
    judge_say '220 judge.example ready'
    for ((lines = 0; lines < 100; lines++)); do
        judge_hear || return 1
        WENT="\"$HEARD\""
        case ${HEARD^^} in
        EHLO\ *) judge_offer ;;
        HELO\ *) judge_say '250 judge.example' ;;
        STARTTLS) if [ "$UNTIL_TLS" ]; then UNTIL_TLS=; judge_start_tls; else judge_say '502 not known here'; fi ;;
        AUTH\ *) if [ "$UNTIL_TLS" ]; then judge_say '538 STARTTLS first'; continue; fi
            CHOSEN=${CHOSEN:-$HEARD}; judge_authenticate || return 1 ;;
        ATRN | ATRN\ *) ATRN=$HEARD; [ -z "$LOGGED_IN" ] || return 0; TOO_EARLY=1
        judge_say '530 Authentication required' ;;
        QUIT) judge_say '221 judge.example'; return 1 ;;
        NOOP* | RSET) judge_say '250 OK' ;;
        *) judge_say '502 not known here' ;;
        esac
    done
    return 1
}
# A provider may offer AUTH inside TLS only (RFC 4954, 4).
judge_offer() {
    judge_say '250-judge.example'
    if [ "$UNTIL_TLS" ]; then judge_say '250-STARTTLS'; else judge_say "250-AUTH ${MECHANISMS:-$JUDGE_MECHANISM}"; fi
    judge_say '250 ATRN'
}
# judge_authenticate: plays the server's part of the mechanisms that the judge knows. For EXTERNAL, TLS has verified the
# customer's certificate, ODMR_CERT.
judge_authenticate() {
    local name initial
    without_blanks "${HEARD#* }"
    name=${TEXT%% *} initial=${TEXT#* }
    [ "$initial" != "$TEXT" ] || initial=
    if [[ " ${MECHANISMS:-$JUDGE_MECHANISM} " != *" ${name^^} "* ]]; then judge_say '504 not here'; return 0; fi
    case ${name^^} in
    CRAM-MD5)
        [ -z "$initial" ] || { judge_say '501 no initial response'; return 0; }
        judge_challenge "$JUDGE_CHALLENGE" || return 1
        judge_reply_to_response "$JUDGE_RIGHT_RESPONSE" ;;
    PLAIN)
        RESPONSE=$initial
        [ -n "$initial" ] || judge_challenge '' || return 1
        RESPONSE=$(unb64 "$RESPONSE" 2> /dev/null | tr '\0' '\n')
        TEXT=$RESPONSE
        [[ $TEXT != "$JUDGE_USER"$'\n'"$JUDGE_USER"$'\n'* ]] || TEXT=${TEXT#*$'\n'}
        TEXT=${TEXT#$'\n'}
        judge_reply_to_response "$JUDGE_USER"$'\n'tanstaaf "$TEXT" ;;
    EXTERNAL)
        RESPONSE=$initial
        [ -n "$initial" ] || judge_challenge '' || return 1
        from_base64 "${RESPONSE#=}"
        judge_reply_to_response "$JUDGE_USER" "${TEXT:-$JUDGE_USER}" ;;
    SCRAM-SHA-256) judge_authenticate_by_scram "$initial" ;;
    *) judge_say '504 not here' ;;
    esac
}
# judge_challenge CHALLENGE: sends the challenge and reads the RESPONSE.
judge_challenge() {
    judge_say "334 $1"
    judge_hear || return 1
    RESPONSE=$HEARD WENT='its response'
}
# judge_reply_to_response RIGHT [RESPONSE]: sends 235 if the response is RIGHT, or else a refusal.
judge_reply_to_response() {
    without_blanks "${2-$RESPONSE}"
    if [ -z "${VERDICT_ON_AUTH:-}" ] && [ "$TEXT" = "$1" ]; then
        LOGGED_IN=1
        judge_say '235 now authenticated'
    else
        judge_say "${VERDICT_ON_AUTH:-535 not with this response}"
    fi
}
judge_authenticate_by_scram() {
    local header bare first final
    RESPONSE=$1
    [ -n "$1" ] || judge_challenge '' || return 1
    from_base64 "$RESPONSE"
    header=${TEXT%"${TEXT#[ny],*,}"} bare=${TEXT#"${TEXT%"${TEXT#[ny],*,}"}"}
    [[ $header =~ ^[ny],[^,]*,$ && $bare =~ ^n=[^,]+,r=([^,]+) ]] || { judge_say '535 no SCRAM'; return 0; }
    first=r=${BASH_REMATCH[1]}$RANDOM$RANDOM,s=c2l4dGVlbiBvY3RldHMuLg==,i=4096
    as_base64 "$first"
    judge_challenge "$TEXT" || return 1
    from_base64 "$RESPONSE"
    final=${TEXT%,p=*}
    as_base64 "$header"
    scram tanstaaf "$bare" "$first" "$final"
    if [[ -n ${VERDICT_ON_AUTH:-} || $final != "c=$TEXT,${first%%,*}"* ]] ||
        { from_base64 "$RESPONSE"; [ "${TEXT##*,p=}" != "$PROOF_OF_IT" ]; }; then
        judge_say "${VERDICT_ON_AUTH:-535 not with this response}"
        return 0
    fi
    as_base64 "v=$SIGNATURE"
    judge_challenge "$TEXT" || return 1
    judge_reply_to_response '' "$RESPONSE"
}
judge_until_atrn() { judge_try_until_atrn || not_observable "it left before ATRN, after $WENT"; }
# judge_hello: sends EHLO, or HELO if EHLO is refused. Sets EHLO to the lines of the response.
judge_hello() {
    if ! judge_try 'EHLO judge.example' 250; then
        [[ $CODE == 5* ]] || departs "$SAID: $ANSWER"
        judge_ask 'HELO judge.example' 250
    fi
    EHLO=("${LINES[@]:1}")
}
# judge_reverse: plays the provider up to the customer's response to EHLO.
judge_reverse() {
    judge_until_atrn
    judge_say '250 OK now reversing the connection'
    judge_read_reply
    [ "$CODE" = 220 ] || not_observable "no greeting after 250: $ANSWER"
    judge_hello
}

# ---- Judging a customer: the rows ----

judge_customer_4-b() {
    judge_until_atrn
    judge_say '250 OK now reversing the connection'
    judge_read_reply
    [ "$CODE" = 220 ] || departs "after 250 came: $ANSWER"
    judge_hello
    judge_ask 'MAIL FROM:<judge@example.edu>' 250
    judge_try "RCPT TO:<judge@$FIRST>" 25. || passes "its server took no mail for judge@$FIRST: $ANSWER"
    judge_ask DATA 354
    judge_write 'Subject: a message of the judge'
    judge_write ''
    judge_write 'The end.'
    judge_try . '2..' || passes "its server did not take the message: $ANSWER"
    judge_ask QUIT 221
    passes
}
judge_customer_5-a() {
    local TOO_EARLY=
    if [ "$SCENE" = 1 ]; then
        VERDICT_ON_AUTH='535 refused' judge_try_until_atrn || true
        [ -n "$CHOSEN" ] || not_observable "it left before AUTH, after $WENT"
        [ -z "$TOO_EARLY" ] || departs "AUTH was refused with 535, and it said \"$ATRN\""
        next_scene
    fi
    judge_until_atrn
    judge_say '453 You have no mail'
    if ! judge_hear; then passes 'after 453 it closed the connection without QUIT'; fi
    [[ $HEARD != 220* ]] || departs "after 453 it took the roles for reversed: $HEARD"
    judge_say '221 judge.example'
    passes
}
judge_customer_5-b() {
    judge_reverse
    judge_silent 1 || departs "the provider had not said QUIT, and came: $HEARD"
    judge_ask QUIT 221
    passes
}
judge_customer_5.1.2-a() {
    judge_try_until_atrn || true
    [ -n "$CHOSEN" ] || departs "it left without AUTH, after $WENT"
    [[ ${CHOSEN^^} =~ ^AUTH\ $JUDGE_MECHANISM(\ .*)?$ ]] ||
        departs "$JUDGE_MECHANISM is offered, and it said \"$CHOSEN\""
    [ "$JUDGE_MECHANISM" = CRAM-MD5 ] || [ -n "$LOGGED_IN" ] || departs "it could not log in by $JUDGE_MECHANISM"
    [ "$JUDGE_MECHANISM" != CRAM-MD5 ] || base64_text "$RESPONSE" || departs "its response is not base64: $RESPONSE"
    passes
}
judge_customer_5.1.2-c() {
    local MECHANISMS=CRAM-MD5
    if judge_try_until_atrn; then passes; fi
    [ -n "$CHOSEN" ] || [ "$JUDGE_MECHANISM" != EXTERNAL ] ||
        not_observable 'it left without AUTH; a customer with a certificate may have no secret'
    [ -n "$CHOSEN" ] || departs "CRAM-MD5 is offered, and it left without AUTH, after $WENT"
    [ -n "$LOGGED_IN" ] ||
        departs "its response to CRAM-MD5 was not the right one: $(unb64 "$RESPONSE" 2> /dev/null | tr -d '\0')"
    passes
}
judge_customer_5.1.2-d() {
    local MECHANISMS='SCRAM-SHA-256 SCRAM-SHA-1 DIGEST-MD5 CRAM-MD5 PLAIN LOGIN EXTERNAL' chosen
    judge_try_until_atrn || true
    [ -n "$CHOSEN" ] || not_observable "it left without AUTH, after $WENT"
    read -r _ chosen _ <<< "$CHOSEN"
    local -A where=([clear]='in the clear' [starttls]='after STARTTLS' [tls]='inside TLS')
    passes "of $MECHANISMS, ${where[$JUDGE_TLS]}, it chose $chosen"
}
judge_customer_5.1.2-f() {
    local MECHANISMS=EXTERNAL
    judge_try_until_atrn || true
    if [[ ${CHOSEN^^} == 'AUTH EXTERNAL'* ]]; then passes "\"$CHOSEN\""; fi
    CHOSEN=${CHOSEN:+\"$CHOSEN\"}
    not_observable "EXTERNAL alone was on offer, and it said ${CHOSEN:-nothing}"
}
judge_customer_5.2.1-c() {
    judge_until_atrn
    local start=${EPOCHREALTIME/./} tenths
    if ! judge_silent "$JUDGE_ATRN_WAIT"; then
        tenths=$(((${EPOCHREALTIME/./} - start) / 100000))
        # A customer may count the 600 s from ATRN or from its connection.
        [ "$tenths" -lt 5980 ] || passes "it waited $((tenths / 10)).$((tenths % 10)) s"
        EXPECTED='it waits 600 s'
        departs "ATRN had no answer yet, and after $((tenths / 10)).$((tenths % 10)) s came: $HEARD"
    fi
    judge_say '453 You have no mail'
    [ "$JUDGE_ATRN_WAIT" -ge 600 ] && passes "silent for $JUDGE_ATRN_WAIT s, and it waited"
    not_observable "silent for $JUDGE_ATRN_WAIT s, and it waited; --atrn-wait 600 decides"
}
judge_customer_5.2.1-l() {
    local label='[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?'
    local domain="$label(\.$label)+"
    judge_until_atrn
    [[ $ATRN =~ ^[Aa][Tt][Rr][Nn](\ $domain(,$domain)*)?$ ]] || departs "it said \"$ATRN\""
    passes "\"$ATRN\""
}
judge_customer_5.3-a() {
    judge_until_atrn
    judge_say '250 OK now reversing the connection'
    judge_read_reply
    [[ $CODE =~ ^[2-5] ]] || departs "after 250 came: $ANSWER"
    judge_hello
    judge_ask RSET 250
    passes
}
# judge_send TEXT [PARAMETERS]: sends a message for judge at FIRST; sets CODE to that of the last reply.
judge_send() {
    judge_ask "MAIL FROM:<judge@example.edu>${2:-}" 250
    judge_try "RCPT TO:<judge@$FIRST>" 25. || not_observable "its server takes no mail for judge@$FIRST: $ANSWER"
    judge_ask DATA 354
    judge_write "Subject: $JUDGE_TOKEN"
    judge_write ''
    judge_write "${1//$'\n'/$'\r\n'}"
    judge_try . '2..'
}
# judge_count_stored TEXT: sets STORED to the number of files in the customer's scratch directory that have TEXT. Files
# in a directory tmp are still being written and do not count.
judge_count_stored() {
    local try
    for try in {1..5}; do
        STORED=$(cd "$T/scratch" && grep -rlF -e "$1" . | grep -vc /tmp/)
        [ "$STORED" = 0 ] || break
        moment 0.2
    done
}
judge_customer_5.3-a2() {
    local n
    judge_reverse
    for n in 1 2 3; do
        judge_send "Message <$n> of this row." && continue
        [ "$n" != 1 ] || not_observable "its server did not take the message: $ANSWER"
        departs "message $n: $ANSWER"
    done
    judge_ask QUIT 221
    judge_count_stored '> of this row.'
    [ "$STORED" != 0 ] || passes 'three messages were taken; where they are stored is not seen'
    EXPECTED='each of 3 messages once'
    for n in 1 2 3; do
        judge_count_stored "Message <$n> of this row."
        [ "$STORED" = 1 ] || departs "message $n was taken and is stored $STORED times"
    done
    passes
}
judge_customer_5.3-a3() {
    local text=$'Subject: x\r\n\r\n.one\r\n..two dots\r\n' seen=
    judge_reverse
    if offers PIPELINING; then
        printf 'MAIL FROM:<judge@example.edu>\r\nRCPT TO:<judge@%s>\r\nDATA\r\n' "$FIRST" >&"${LINE_OUT:-$LINE}"
        SAID='MAIL, RCPT and DATA at once' EXPECTED='250, 250, 354'
        judge_read_reply
        [ "$CODE" = 250 ] || departs "$SAID: MAIL: $ANSWER"
        judge_read_reply
        [[ $CODE == 25? ]] || not_observable "its server takes no mail for judge@$FIRST: $ANSWER"
        judge_read_reply
        [ "$CODE" = 354 ] || departs "$SAID: DATA: $ANSWER"
        judge_write $'Subject: x\r\n\r\nPipelined.'
        judge_ask . 250
        seen='PIPELINING'
    fi
    if offers CHUNKING; then
        judge_ask 'MAIL FROM:<judge@example.edu>' 250
        judge_try "RCPT TO:<judge@$FIRST>" 25. || not_observable "its server takes no mail for judge@$FIRST: $ANSWER"
        printf 'BDAT %d\r\n%s' ${#text} "$text" >&"${LINE_OUT:-$LINE}"
        SAID='BDAT' EXPECTED=250
        judge_read_reply
        [ "$CODE" = 250 ] || departs "BDAT: $ANSWER"
        judge_ask 'BDAT 0 LAST' 250
        judge_count_stored '.two dots'
        if [ "$STORED" != 0 ]; then
            judge_count_stored '..two dots'
            [ "$STORED" != 0 ] || departs 'a dot of BDAT was taken away'
        fi
        seen+="${seen:+ and }CHUNKING"
    fi
    judge_ask QUIT 221
    passes "${seen:-neither PIPELINING nor CHUNKING} offered"
}
# In the first scene the connection ends in the middle of the second message.
judge_customer_5.3-a4() {
    if [ "$SCENE" = 1 ]; then
        judge_reverse
        judge_send 'Message <1> of this row, whole.' || not_observable "its server did not take the message: $ANSWER"
        judge_ask 'MAIL FROM:<judge@example.edu>' 250
        judge_ask "RCPT TO:<judge@$FIRST>" 25.
        judge_ask DATA 354
        judge_write $'Subject: x\r\n\r\nMessage <2> of this row, and'
        moment 0.3 # inside TLS the last octets could be lost with the connection
        next_scene
    fi
    judge_try_until_atrn || true
    judge_say '453 You have no mail'
    judge_count_stored 'Message <1> of this row'
    [ "$STORED" != 0 ] || not_observable 'where messages are stored is not seen'
    judge_count_stored 'Message <2> of this row'
    [ "$STORED" = 0 ] || departs 'a message that was cut off is stored as if it were whole'
    passes
}
judge_customer_5.3-a5() {
    judge_reverse
    offers 8BITMIME || passes '8BITMIME is not offered'
    judge_send $'M\xc3\xbcll \xff of this row' ' BODY=8BITMIME' ||
        not_observable "its server did not take the message: $ANSWER"
    judge_ask QUIT 221
    judge_count_stored "$JUDGE_TOKEN"
    [ "$STORED" != 0 ] || passes 'it was taken; where it is stored is not seen'
    judge_count_stored $'M\xc3\xbcll \xff of this row'
    [ "$STORED" != 0 ] || departs '8-bit octets of a message with BODY=8BITMIME came out changed'
    passes
}
# If two servers disagree about the end of a message, mail can be smuggled.
judge_customer_5.3-a6() {
    judge_reverse
    judge_ask 'MAIL FROM:<judge@example.edu>' 250
    judge_try "RCPT TO:<judge@$FIRST>" 25. || not_observable "its server takes no mail for judge@$FIRST: $ANSWER"
    judge_ask DATA 354
    printf 'Subject: x\r\n\r\nA line.\n.\nRSET\r\n' >&"${LINE_OUT:-$LINE}"
    SAID='LF, a dot, LF' EXPECTED='no reply before CRLF, a dot, CRLF'
    judge_silent 1 || departs "LF, a dot, LF was taken for the end of a message: $HEARD"
    judge_try . '[245]..' || departs "$SAID: $ANSWER"
    passes "a message with LF alone: $CODE"
}
judge_customer_5.3-a7() {
    judge_reverse
    judge_ask 'MAIL FROM:<judge@example.edu>' 250
    judge_try 'RCPT TO:<judge@not-asked-for.example>' '[245]..' || departs "$SAID: $ANSWER"
    passes "for a domain that it did not ask for: $CODE"
}
# If the customer's server waits for EHLO instead of greeting, the row sends EHLO and reports the reply.
judge_customer_5.3-b() {
    judge_until_atrn
    judge_say '250 OK now reversing the connection'
    if judge_silent "$PATIENCE"; then
        judge_say 'EHLO judge.example'
        judge_read_reply
        departs "$PATIENCE s after 250 no greeting had come; to EHLO it said: $ANSWER"
    fi
    [[ $HEARD =~ ^220([ -]|$) ]] || departs "after 250 came: $HEARD"
    passes
}
judge_customer_6-a() {
    local command
    judge_reverse
    [[ $JUDGE_MECHANISM != CRAM-MD5 || $RESPONSE != *[[:blank:]] ]] ||
        departs 'the base64 of its response has a blank behind it'
    for command in 'MAIL FROM: <judge@example.edu>' "RCPT TO: <judge@$FIRST>"; do
        judge_try "$command" '25.' && continue
        departs_if_only_the_blank "$command" "$ANSWER"
    done
    passes
}
# departs_if_only_the_blank COMMAND REPLY: COMMAND was refused. The row departs if the server accepts the same command
# without the blank.
departs_if_only_the_blank() {
    judge_get_past "${1/: </:<}" '25.'
    departs "\"$1\": $2"
}
judge_customer_8-b() {
    local MECHANISMS="X-STRONGER $JUDGE_MECHANISM"
    if judge_try_until_atrn; then passes; fi
    departs "X-STRONGER and $JUDGE_MECHANISM are offered, and it left after $WENT"
}

# ---- Judging: one row, and the report ----

# judge_row SIDE ID: runs a row in this shell and in the scratch directory $T.
judge_row() {
    STARTED=()
    trap 'kill -9 "${STARTED[@]}" 2> /dev/null; wait 2> /dev/null' EXIT
    fail() { not_observable "the suite itself: $*"; }
    DEADLINE=$((SECONDS + PATIENCE * 6))
    if [ "$1" = provider ]; then "judge_provider_$2"; else run_scenes "judge_customer_$2"; fi
}
# run_scenes FUNCTION: starts the customer, once for each scene, and waits for the verdict.
run_scenes() {
    local customer tenths OVER_TLS=
    export SCENE
    [ "$JUDGE_TLS" = clear ] || cp "$JUDGE_DIR/server.pem" "$T/server.pem"
    [ "$JUDGE_TLS" != tls ] || OVER_TLS=yes
    for SCENE in 1 2; do
        [ "$SCENE" = 1 ] || rm -f "$T/connected"
        serve "$1"
        start_customer &
        customer=$!
        wait_for_customer "$customer" $((PATIENCE * 40 + JUDGE_ATRN_WAIT * 10))
        if [ -e "$T/scene.$SCENE" ]; then tenths=50; else tenths=10; fi # the end of the connection is judged, too
        wait_for_customer "$customer" "$tenths" gone
        kill "$customer" 2> /dev/null
        wait "$customer"
        [ -e "$T/scene.$SCENE" ] || break
    done
    [ -e "$T/verdict" ] || [ -e "$T/connected" ] ||
        not_observable "it did not connect; it said: $(tail -n 1 "$T/customer.log")"
}
# wait_for_customer PID TENTHS [gone]: waits until the scene is over, or, with "gone", until the customer has ended. If
# the customer ends first, the scene has a few seconds to reach its verdict.
wait_for_customer() {
    local n grace=0
    for ((n = 0; n < $2 && grace < 60; n++)); do
        if [ -e "$T/verdict" ] || [ -e "$T/scene.$SCENE" ]; then [ -n "${3:-}" ] || return 0; fi
        kill -0 "$1" 2> /dev/null || { [ -e "$T/connected" ] && [ -z "${3:-}" ] || return 0; grace=$((grace + 1)); }
        moment 0.1
    done
}
start_customer() {
    [ -d "$T/scratch" ] || mkdir "$T/scratch"
    export ODMR_HOST=127.0.0.1 ODMR_PORT=$PORT ODMR_ADDRESS=127.0.0.1:$PORT ODMR_USER=$JUDGE_USER ODMR_SECRET
    export ODMR_CA='' ODMR_CERT='' ODMR_SECRET_FILE=$JUDGE_SECRET_FILE
    export ODMR_DOMAINS=$JUDGE_DOMAINS ODMR_SCRATCH=$T/scratch
    [ "$JUDGE_TLS" = clear ] || ODMR_CA=$JUDGE_DIR/server.crt
    [ -z "$CLIENTS" ] || ODMR_CERT=$JUDGE_DIR/client.pem
    IFS= read -r ODMR_SECRET < "$JUDGE_SECRET_FILE"
    ODMR_SECRET=${ODMR_SECRET%$'\r'}
    exec timeout -k 1 $((PATIENCE * 5 + JUDGE_ATRN_WAIT)) sh -c "$JUDGE_CUSTOMER" > "$T/customer.log" 2>&1 < /dev/null
}

# requirements: sets REQUIREMENTS to "id level side" of each requirement in RFC2645.txt and of each row of MORE_ROWS.
requirements() {
    local entry='^  ([4-8][0-9.]*-[a-z])  ([MNmp])  (provider|customer|both|site)$'
    local requirement row words
    if [ -v REQUIREMENTS ]; then return; fi
    REQUIREMENTS=()
    while IFS= read -r requirement; do
        REQUIREMENTS+=("$requirement")
        for row in "${MORE_ROWS[@]}"; do
            [[ $row == "${requirement%% *}"[2-9]\ * ]] || continue
            read -r -a words <<< "$row"
            REQUIREMENTS+=("${words[*]:0:3}")
        done
    done < <(sed -nE "s/$entry/\1 \2 \3/p" "$here/RFC2645.txt")
}
# Further rows, for several messages, several sessions and lost connections. Each has its level, its side and its
# requirement.
MORE_ROWS=(
    '4-e2 p provider Several messages of one session all come, each once and unchanged.'
    '4-e3 p provider Inside TLS, several messages of one session all come, each once and unchanged.'
    '4-e4 p provider Two sessions of one account at once get each message once.'
    '4-e5 p provider A message that was cut off comes whole in the next session.'
    '4-e6 p provider The sender of a message whose recipient is refused gets a notice.'
    '5.2.1-e2 N provider Recipients of a foreign domain are not sent, also after another message of the session.'
    '5.2.1-e3 N provider Mail that another account has deferred at the same address is not sent.'
    '5.2.1-h2 p provider While another session has all the mail, a 250 leads to EHLO and then to QUIT.'
    '5.3-a2 p customer The server takes several messages of one session, and stores each once.'
    '5.3-a3 p customer PIPELINING and BDAT work where they are offered.'
    '5.3-a4 p customer A message that was cut off is not stored.'
    '5.3-a5 p customer 8-bit octets arrive unchanged where 8BITMIME is offered.'
    '5.3-a6 p customer LF, a dot, LF does not end a message.'
    '5.3-a7 m customer The reply to a recipient in a domain that was not asked for.'
)
# judged_here SIDE WHO ID: true if requirement ID, which binds WHO, is judged on SIDE. Only the customer waits for the
# reply to ATRN (5.2.1-c).
judged_here() {
    [ "$1 $3" != 'provider 5.2.1-c' ] || return 1
    [ "$2" = both ] || [ "$2" = "$1" ] || [ "$1 $2" = 'provider site' ]
}

# rules: sets RULE to the requirement of each row in one sentence, the first of "rule" in RFC2645.txt.
rules() {
    local id text row
    declare -gA RULE=()
    while IFS=$'\t' read -r id text; do RULE[$id]=$text; done < <(awk '
        function over() {
            if (id != "" && text != "") { sub(/\. .*/, ".", text); print id "\t" text }
            text = ""; rule = 0
        }
        /^  [4-8][0-9.]*-[a-z]  [MNmp]  / { over(); id = $1; next }
        /^  [^ ]/ { over(); id = ""; next }
        /^    rule: / { rule = 1; sub(/^    rule: /, ""); text = $0; next }
        /^      [^ ]/ && rule { sub(/^ +/, ""); text = text " " $0; next }
        { over() }' "$here/RFC2645.txt")
    for row in "${MORE_ROWS[@]}"; do read -r id _ _ text <<< "$row"; RULE[$id]=$text; done
    # The first sentences of these rules are not clear without the rule before them.
    RULE[5.2.1-f]='ATRN that names a domain without access is rejected with 450.'
    RULE[5.3-b]='After the success reply to ATRN the customer sends a standard SMTP greeting.'
    RULE[6-a]='The dialogue is that of the example session.'
}
# judge_all SIDE: sets ROWS to "level TAB id TAB verdict TAB seen TAB expected" for each requirement of this side, or
# for each in JUDGE_ONLY. ELSEWHERE counts the requirements of the other side.
judge_all() {
    local requirement level id who verdict text expected met= scratch
    ROWS=() ELSEWHERE=0
    scratch=("${REQUIREMENTS[@]%% *}")
    mkdir "${scratch[@]/#/$JUDGE_DIR/}"
    for requirement in "${REQUIREMENTS[@]}"; do
        read -r id level who <<< "$requirement"
        [ -z "$JUDGE_ONLY" ] || [[ ,$JUDGE_ONLY, == *",$id,"* ]] || continue
        judged_here "$1" "$who" "$id" || { ELSEWHERE=$((ELSEWHERE + 1)); continue; }
        ( T=$JUDGE_DIR/$id; judge_row "$1" "$id" ) > "$JUDGE_DIR/$id/log" 2>&1 < /dev/null
        verdict='not observable' text='the suite itself failed' expected=
        [ ! -s "$JUDGE_DIR/$id/verdict" ] || IFS=$'\t' read -r verdict text expected < "$JUDGE_DIR/$id/verdict"
        [ "$text" != . ] || text=
        [ -z "$JUDGE_TRANSCRIPT" ] || [ ! -e "$JUDGE_DIR/$id/transcript" ] ||
            cp "$JUDGE_DIR/$id/transcript" "$JUDGE_TRANSCRIPT/$id"
        [[ $1 == customer && $text == 'it did not connect'* ]] || met=1
        [ -n "$met" ] || { echo "$text" >&2; exit 69; }
        ROWS+=("$level"$'\t'"$id"$'\t'"$verdict"$'\t'"${text:-.}"$'\t'"$expected")
    done
}

# report SIDE TARGET OPTION...: prints ROWS, with MUST, prose and permitted choices apart. True if no MUST and no MUST
# NOT failed.
report() {
    local class row level id verdict text expected form=$JUDGE_REPORT
    local -A count=() names=([M]=MUST [N]='MUST NOT' [p]=prose [m]=MAY)
    local -A channel=([clear]='in the clear' [starttls]='inside TLS, by STARTTLS'
        [tls]='inside TLS, from the first octet')
    rules
    for row in "${ROWS[@]}"; do
        IFS=$'\t' read -r level id verdict text <<< "$row"
        class=${level/[MN]/MN}
        count[$class $verdict]=$((${count[$class $verdict]:-0} + 1))
    done
    "report_head_$form" "$@"
    for class in MN p m; do
        [[ $'\n'$(printf '%s\n' "${ROWS[@]}") == *$'\n'[$class]$'\t'* ]] || continue
        [ "$form" = json ] || heading "$class"
        for row in "${ROWS[@]}"; do
            IFS=$'\t' read -r level id verdict text expected <<< "$row"
            [[ $class == *"$level"* ]] || continue
            [ "$text" != . ] || text=
            if [ "$verdict" = fail ]; then expected=${expected:-${RULE[$id]}}; fi
            "report_row_$form" "${names[$level]}"
        done
    done
    "report_end_$form"
    [ "${count[MN fail]:-0}" = 0 ]
}
# command_line OPTION...: sets COMMAND to the command that started this judge.
command_line() {
    local word
    COMMAND=./test_odmr.sh
    for word; do
        if [[ $word =~ ^[A-Za-z0-9@%+=:,./_-]+$ ]]; then COMMAND+=" $word"
        else COMMAND+=" '${word//\'/\'\\\'\'}'"; fi
    done
    COMMAND=${COMMAND//[!\ -~]/?}
}
# head_lines: sets HEAD to the lines below the title.
head_lines() {
    local version
    version=$(sed -n 's/^#define ODMR_VERSION "\(.*\)"/\1/p' "$here/odmr.c" 2> /dev/null)
    HEAD=("Judged on $(date -u +%Y-%m-%dT%H:%M:%SZ) by test_odmr.sh of odmr${version:+ $version}.")
    HEAD+=("Judged ${channel[$JUDGE_TLS]}, with $JUDGE_MECHANISM.")
    [ ! -s "$JUDGE_DIR/bare" ] || { printed "$(< "$JUDGE_DIR/bare")"
        HEAD+=("ATRN without domains is refused ($PRINTED), so other rows name a domain."); }
}
count_line() {
    printf 'MUST and MUST NOT: %d pass, %d fail, %d not observable. Prose: %d pass, %d fail, %d not observable.\n' \
        "${count[MN pass]:-0}" "${count[MN fail]:-0}" "${count[MN not observable]:-0}" \
        "${count[p pass]:-0}" "${count[p fail]:-0}" "${count[p not observable]:-0}"
}
heading() {
    local -A text=([MN]='MUST and MUST NOT: a failure is a breach of the standard'
        [p]='Plain prose: a failure is a departure from what the standard describes'
        [m]='MAY: permitted choices, and which was seen')
    if [ "$form" = text ]; then printf '\n%s\n' "${text[$1]}"; return; fi
    printf '\n## %s\n\n| id | clause | level | requirement | verdict | seen | expected |\n' "${text[$1]}"
    echo '|---|---|---|---|---|---|---|'
}

report_head_text() {
    printf 'The %s %s, by RFC 2645\n' "$1" "$2"
    command_line "${@:3}"
    head_lines
    printf '%s\n' "Command: $COMMAND" "${HEAD[@]}"
}
report_row_text() {
    if [ -z "$text" ]; then printf '%-8s %-9s %s\n' "$id" "$1" "$verdict"
    else printf '%-8s %-9s %-14s %s\n' "$id" "$1" "$verdict" "$text"; fi
    printf '         %s: %s\n' "${id%-*}" "${RULE[$id]}"
    [ "$verdict" != fail ] || printf '         expected: %s\n' "$expected"
}
report_end_text() {
    echo
    count_line
    echo "Asked of the other side: $ELSEWHERE."
}

# code_span TEXT: sets MARKDOWN to a code span of Markdown.
code_span() { if [[ $1 == *\`* ]]; then MARKDOWN="\`\` $1 \`\`"; else MARKDOWN="\`$1\`"; fi; }
# markdown_text TEXT: sets MARKDOWN to TEXT with all characters escaped that Markdown or HTML would interpret.
markdown_text() { MARKDOWN=$(sed -e 's/[]\`*_[|]/\\&/g' -e 's/&/\&amp;/g' -e 's/</\&lt;/g' <<< "$1"); }
report_head_markdown() {
    local line
    if [ "$1" = customer ]; then code_span "$2"; else MARKDOWN=$2; fi
    printf '# The %s %s, by RFC 2645\n' "$1" "$MARKDOWN"
    command_line "${@:3}"
    code_span "$COMMAND"
    printf '\nCommand: %s\n' "$MARKDOWN"
    head_lines
    for line in "${HEAD[@]}"; do markdown_text "$line"; printf '\n%s\n' "$MARKDOWN"; done
}
report_row_markdown() {
    local seen rule
    markdown_text "$text"; seen=$MARKDOWN
    markdown_text "${RULE[$id]}"; rule=$MARKDOWN
    markdown_text "$expected"
    printf '| %s | %s | %s | %s | %s | %s | %s |\n' "$id" "${id%-*}" "$1" "$rule" "$verdict" "$seen" "$MARKDOWN"
}
report_end_markdown() { echo; count_line; printf '\nAsked of the other side: %s.\n' "$ELSEWHERE"; }

# json NAME VALUE...: prints the fields in JSON. The values are printable ASCII.
json() {
    local value between=
    while [ $# -gt 0 ]; do
        value=${2//\\/\\\\}
        printf '%s"%s": "%s"' "$between" "$1" "${value//\"/\\\"}"
        between=', '
        shift 2
    done
}
report_head_json() {
    command_line "${@:3}"
    head_lines
    printf '{%s, "rows": [' "$(json side "$1" target "$2" command "$COMMAND" judged "${HEAD[0]}" channel "$JUDGE_TLS" \
        mechanism "$JUDGE_MECHANISM" note "${HEAD[2]:-}")"
    BETWEEN=
}
report_row_json() {
    printf '%s\n  {%s}' "$BETWEEN" "$(json id "$id" clause "${id%-*}" level "$1" requirement "${RULE[$id]}" \
        verdict "$verdict" seen "$text" expected "$expected")"
    BETWEEN=,
}
report_end_json() {
    local key pairs=
    for key in 'MN pass' 'MN fail' 'MN not observable' 'p pass' 'p fail' 'p not observable'; do
        pairs+=", \"$key\": ${count[$key]:-0}"
    done
    printf '\n], "counts": {"asked of the other side": %d%s}}\n' "$ELSEWHERE" \
        "$(sed -e 's/"MN /"MUST /g' -e 's/"p /"prose /g' <<< "$pairs")"
}

# reach_provider: exits if the provider cannot be reached or does not serve the judge now.
reach_provider() {
    local code=0 greeting
    greeting=$(timeout "$PATIENCE" bash -c 'exec 3<> "/dev/tcp/$0/$1" || exit 69
        [ "$2" != tls ] || exit 0
        IFS= read -r -n 400 line <&3 || exit 75; echo "$line"' \
        "$JUDGE_HOST" "$JUDGE_PORT" "$JUDGE_TLS" 2> /dev/null) || code=$?
    if [ "$code" = 0 ] && [[ $greeting == 4* ]]; then
        code=75
    elif [ "$code" = 0 ] && [[ $greeting == 5* ]]; then
        code=69
    fi
    printed "$greeting"
    case $code in
    0) return ;;
    69) echo "$JUDGE_HOST:$JUDGE_PORT cannot be reached${greeting:+: $PRINTED}" >&2; exit 69 ;;
    *) echo "$JUDGE_HOST:$JUDGE_PORT does not serve us now${greeting:+: $PRINTED}" >&2; exit 75 ;;
    esac
}

# enter_channel: sets JUDGE_TLS and JUDGE_MECHANISM to those that the provider allows.
enter_channel() {
    mkdir "$JUDGE_DIR/learning"
    ( T=$JUDGE_DIR/learning; STARTED=(); judge_learn_channel ) > "$JUDGE_DIR/learning/log" 2>&1 < /dev/null
    if [ -s "$JUDGE_DIR/channel" ]; then
        read -r JUDGE_TLS JUDGE_MECHANISM < "$JUDGE_DIR/channel"
    elif [ "$JUDGE_TLS" != clear ]; then
        T=$JUDGE_DIR/learning tls_complaint
    fi
    if [ -e "$JUDGE_DIR/tls.failed" ]; then
        printed "$(< "$JUDGE_DIR/tls.failed")"
        echo "$JUDGE_HOST:$JUDGE_PORT: no TLS that can be trusted: $PRINTED; --ca FILE or --insecure may help" >&2
        exit 69
    fi
    JUDGE_MECHANISM=${JUDGE_MECHANISM:-CRAM-MD5}
}

judge_usage() {
    cat >&2 << END
$self: $1
usage: $0 [--list] [NAME...]
       $0 --provider HOST:PORT --user NAME --secret-file FILE --domains A,B --foreign-domain C
           [--starttls | --tls] [--ca FILE | --insecure] [--cert FILE --key FILE] [--mechanism NAME]
           [--other-user NAME --other-secret-file FILE] [--notice-dir DIR]
           [--inject COMMAND] [--only ID,...] [--report text|markdown|json] [--transcript DIR]
       $0 --customer COMMAND [--starttls | --tls] [--mechanism NAME] [--atrn-wait SECONDS]
           [--only ID,...] [--report text|markdown|json] [--transcript DIR]
README, "Judging another implementation", explains them.
END
    exit 64
}
# judge_options OPTION...: sets the JUDGE_ variables, which the rows' processes inherit.
judge_options() {
    local name='[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?' domain id
    requirements
    domain="$name(\.$name)+"
    export PATIENCE JUDGE_USER=example.org JUDGE_SECRET_FILE='' JUDGE_DOMAINS=example.org,example.com JUDGE_FOREIGN='' \
        JUDGE_INJECT='' JUDGE_REPORT=text JUDGE_TRANSCRIPT='' JUDGE_ONLY='' \
        JUDGE_TLS=clear JUDGE_INSECURE='' JUDGE_CA='' JUDGE_CERT='' JUDGE_KEY='' JUDGE_MECHANISM='' \
        JUDGE_OTHER_USER='' JUDGE_OTHER_SECRET='' JUDGE_NOTICE_DIR='' \
        JUDGE_ATRN_WAIT=35 JUDGE_CUSTOMER='' JUDGE_HOST='' JUDGE_PORT='' JUDGE_DIR \
        JUDGE_TOKEN="odmr-judge-$$-$RANDOM$RANDOM"
    local given=' ' option
    [[ " $* " != *' --help '* ]] || judge_usage 'the options of the judge'
    while [ $# -gt 0 ]; do
        case $1 in
        --starttls) JUDGE_TLS=starttls given+="$1 "; shift; continue ;;
        --tls) JUDGE_TLS=tls given+="$1 "; shift; continue ;;
        --insecure) JUDGE_INSECURE=1 given+="$1 "; shift; continue ;;
        esac
        [ $# -gt 1 ] || judge_usage "$1 takes a value"
        case $1 in
        --provider) JUDGE_HOST=${2%:*} JUDGE_PORT=${2##*:}; JUDGE_HOST=${JUDGE_HOST#[}; JUDGE_HOST=${JUDGE_HOST%]}
            [[ $JUDGE_HOST =~ ^[A-Za-z0-9.:_-]+$ && $JUDGE_PORT =~ ^[0-9]{1,5}$ ]] ||
                judge_usage "$2 is no HOST:PORT" ;;
        --customer) JUDGE_CUSTOMER=$2; [ -n "$2" ] || judge_usage 'there is no customer to start' ;;
        --user) JUDGE_USER=$2 ;;
        --secret-file) JUDGE_SECRET_FILE=$2
        [ -s "$2" ] && [ -r "$2" ] || judge_usage "$2 cannot be read, or is empty" ;;
        --domains) JUDGE_DOMAINS=$2; [[ $2 =~ ^$domain(,$domain)*$ ]] || judge_usage "$2 is no list of domains" ;;
        --foreign-domain) JUDGE_FOREIGN=$2; [[ $2 =~ ^$domain$ ]] || judge_usage "$2 is no domain" ;;
        --inject) JUDGE_INJECT=$2 ;;
        --notice-dir) JUDGE_NOTICE_DIR=$2; [ -d "$2" ] || judge_usage "$2 is no directory" ;;
        --other-user) JUDGE_OTHER_USER=$2 ;;
        --other-secret-file) JUDGE_OTHER_SECRET=$2
            [ -s "$2" ] && [ -r "$2" ] || judge_usage "$2 cannot be read, or is empty" ;;
        --ca | --cert | --key) [ -r "$2" ] || judge_usage "$2 cannot be read"
            option=${1#--} && printf -v "JUDGE_${option^^}" %s "$2" ;;
        --mechanism) JUDGE_MECHANISM=${2^^}
            [[ $JUDGE_MECHANISM =~ ^(CRAM-MD5|SCRAM-SHA-256(-PLUS)?|PLAIN|EXTERNAL)$ ]] ||
                judge_usage "$2 is no mechanism that the judge knows" ;;
        --atrn-wait) JUDGE_ATRN_WAIT=$2; [[ $2 =~ ^[1-9][0-9]{0,4}$ ]] || judge_usage "$2 is no number of seconds" ;;
        --only) JUDGE_ONLY=$2
            for id in ${2//,/ }; do
                [[ "${REQUIREMENTS[*]/#/;}" == *";$id "* ]] || judge_usage "$id is no id of RFC2645.txt"
            done ;;
        --report) JUDGE_REPORT=$2; [[ $2 =~ ^(text|markdown|json)$ ]] || judge_usage "$2 is no form of report" ;;
        --transcript) JUDGE_TRANSCRIPT=$2; [ -d "$2" ] || judge_usage "$2 is no directory" ;;
        *) judge_usage "$1 is not known" ;;
        esac
        given+="$1 "
        shift 2
    done
    local need=' --user --domains --foreign-domain ' not=' --atrn-wait '
    [ "$JUDGE_MECHANISM" = EXTERNAL ] || need+='--secret-file '
    [ -z "$JUDGE_CUSTOMER" ] ||
        { not=' --user --secret-file --domains --foreign-domain --inject --ca --insecure --cert --key '
            not+='--notice-dir --other-user --other-secret-file '; need=' '; }
    [[ $given != *' --other-user '* ]] || need+='--other-secret-file '
    [[ $given == *' --cert '* ]] || not+='--key '
    JUDGE_KEY=${JUDGE_KEY:-$JUDGE_CERT}
    [[ $given != *' --tls '* || $given != *' --starttls '* ]] ||
        judge_usage 'either --tls or --starttls'
    for option in $need; do [[ $given == *" $option "* ]] || judge_usage "$option is missing"; done
    for option in $not; do [[ $given != *" $option "* ]] || judge_usage "$option does not go with this"; done
    [[ $given == *' --provider '* ]] || [[ $given == *' --customer '* ]] ||
        judge_usage '--provider or --customer is missing'
    [ -z "$JUDGE_CUSTOMER" ] || [ -z "$JUDGE_HOST" ] || judge_usage 'either --provider or --customer'
}

# judge_needs PROGRAM...: exits with 69 before the report if a program is not installed.
judge_needs() {
    local name
    for name; do
        type -P "$name" > /dev/null || { echo "$self: $name is not installed, and the judge needs it" >&2; exit 69; }
    done
    perl -MDigest::MD5 -MDigest::SHA -MMIME::Base64 -e 1 2> /dev/null ||
        { echo "$self: the judge needs perl's Digest::MD5, Digest::SHA and MIME::Base64" >&2; exit 69; }
}
# judge OPTION...: runs all rows and prints the report. The exit status says if a MUST or MUST NOT failed.
judge() {
    local side=provider target
    unset OVER_TLS
    export MISSING=
    [ -r "$here/RFC2645.txt" ] || { echo "$self: the judge needs RFC2645.txt in the same directory" >&2; exit 69; }
    judge_options "$@"
    judge_needs openssl perl socat
    export FIRST=${JUDGE_DOMAINS%%,*}
    JUDGE_DIR=$(mktemp -d "${TMPDIR:-/tmp}/odmr-judge-XXXXXX")
    trap 'rm -rf "$JUDGE_DIR"' EXIT
    if [ -n "$JUDGE_CUSTOMER" ]; then
        printed "$JUDGE_CUSTOMER"
        side=customer target=$PRINTED
        JUDGE_SECRET_FILE=$JUDGE_DIR/secret
        (umask 077; echo tanstaaf > "$JUDGE_SECRET_FILE")
        judge_cram_response "$JUDGE_CHALLENGE"
        export JUDGE_RIGHT_RESPONSE=$RESPONSE
        JUDGE_MECHANISM=${JUDGE_MECHANISM:-CRAM-MD5}
        [ "$JUDGE_TLS" = clear ] || T=$JUDGE_DIR certificate server /CN=localhost DNS:localhost,IP:127.0.0.1
        export CLIENTS=
        if [ "$JUDGE_MECHANISM" = EXTERNAL ]; then
            T=$JUDGE_DIR certificate client "/CN=$JUDGE_USER"
            CLIENTS=cafile=$JUDGE_DIR/client.crt
        fi
    else
        target=$JUDGE_HOST:$JUDGE_PORT
        reach_provider
        enter_channel
    fi
    judge_all "$side"
    report "$side" "$target" "$@"
}

# ---- The judge, judged -----------------------------------------------------------------------------------

needs_judge() { needs openssl socat perl; missing "perl's Digest::MD5"; }
# run_judge CODE OPTION...: runs the judge in this shell. The report is in $T/out.
run_judge() {
    local wanted=$1 code=0
    shift
    needs_judge
    ( PATIENCE=${JUDGE_PATIENCE:-$PATIENCE}; judge "$@" ) > "$T/out" 2> "$T/err" || code=$?
    [ "$code" = "$wanted" ] || { cat "$T/out" "$T/err" >&2; fail "exit $code, not $wanted, of the judge: $*"; }
}
# run_judge_on_provider CODE OPTION...: judges the provider on $PORT with the queue $T/queue.
run_judge_on_provider() {
    local code=$1
    shift
    echo tanstaaf > "$T/secret"
    echo 'another secret: with colons' > "$T/other"
    run_judge "$code" --provider "127.0.0.1:$PORT" --user example.org --secret-file "$T/secret" \
        --domains example.org,example.com \
        --foreign-domain other.example --inject \
        "'$ODMR' enqueue -q '$T/queue' -f \"\$ODMR_SENDER\" \$ODMR_RECIPIENTS" "$@"
}
run_judge_on_customer() {
    local code=$1
    shift
    local command="customer ${TO_CUSTOMER:-} "'-q "$ODMR_SCRATCH/mail" -u "$ODMR_USER" "$ODMR_ADDRESS"'
    command+=' ${ODMR_DOMAINS%,*} ${ODMR_DOMAINS#*,}'
    run_judge "$code" --customer "'$ODMR' $command" "$@"
}
# rows_with VERDICT: prints the ids with this verdict, in order.
rows_with() {
    awk -v verdict="$1" '/^[4-8][0-9.]*-[a-z][2-9]? / && substr($0, 20, length(verdict)) == verdict {
        print $1 }' "$T/out" | sort | tr '\n' ' '
}

# No row of our own provider fails, and none is missing from the report.
# not with: SANITIZE, OVER_TLS
t_judge_our_provider() {
    notices_into_a_directory
    authority
    provider --cert "$T/server.pem"
    run_judge_on_provider 0 --other-user other --other-secret-file "$T/other" --notice-dir "$T/notices"
    equal "$(rows_with fail)" ''
    equal "$(rows_with 'not observable')" '4-a 4-d 5.1.2-f 5.2.1-k 8-a '
    has "$T/out" '^Asked of the other side: 8\.$'
    equal "$(grep -c '^[4-8][0-9.]*-[a-z][2-9]\? ' "$T/out")" 44
    equal "$(waiting)" 0
    has "$T/out" '^MUST and MUST NOT: 7 pass, 0 fail, 0 not observable\. Prose: 27 pass, 0 fail, 5 not observable\.$'
}
notices_into_a_directory() {
    mkdir "$T/notices"
    printf '%s\n' '#!/bin/sh' "cat > '$T/notices/'\$\$" > "$T/sendmail"
    chmod 755 "$T/sendmail"
}

# No lawful configuration of our own provider breaks a MUST or MUST NOT. AUTH is inside TLS only, by STARTTLS or
# implicit TLS, or without CRAM-MD5 and with an interval between two requests, or by EXTERNAL or PLAIN.
BREACHES=5.1.1-b,5.1.2-c,5.2.1-b,5.2.1-e,5.2.1-e2,5.2.1-e3,5.2.1-f
# not with: SANITIZE, OVER_TLS, BRIEF
t_judge_lawful_configurations() {
    authority
    certificate client /CN=example.org '' ca
    in_configuration strict "$BREACHES" 'inside TLS, by STARTTLS, with CRAM-MD5' \
        --cert server.pem --require-tls -- --ca ca.crt &
    in_configuration implicit "$BREACHES" 'inside TLS, from the first octet, with SCRAM-SHA-256-PLUS' \
        --cert server.pem --tls-listen 127.0.0.1:0 -- --tls --ca ca.crt --mechanism SCRAM-SHA-256-PLUS &
    in_configuration external "${BREACHES/,5.2.1-e3}" 'inside TLS, by STARTTLS, with EXTERNAL' \
        --cert server.pem --client-ca ca.crt -- --insecure --cert client.pem --mechanism EXTERNAL &
    in_configuration stronger "${BREACHES/,5.1.2-c}" 'in the clear, with SCRAM-SHA-256' \
        --no-cram-md5 --interval 1 -- &
    in_configuration plain "$BREACHES" 'inside TLS, by STARTTLS, with PLAIN' \
        --cert server.pem -- --ca ca.crt --mechanism PLAIN &
    wait
    equal "$(how_many '"$T"/*/passed')" 5
}
# in_configuration NAME PASSES CHANNEL PROVIDER-OPTION... -- JUDGE-OPTION...: judges a provider with these options.
in_configuration() {
    local options=() passes=$2 channel=$3
    mkdir "$T/$1"
    cp ca.crt client.pem server.pem "$T/$1"
    cd "$T/$1" || exit 1
    T=$T/$1 PROVIDER=
    trap 'kill -9 $PROVIDER' EXIT
    shift 3
    while [ "$1" != -- ]; do options+=("$1"); shift; done
    shift
    provider "${options[@]}"
    [[ " ${options[*]} " != *' --tls-listen '* ]] || PORT=${PORTS[1]}
    run_judge_on_provider 0 "$@" --other-user other --other-secret-file "$T/other" --only "$BREACHES"
    has "$T/out" "^Judged $channel\\.\$"
    equal "$(rows_with fail)$(rows_with pass)" "${passes//,/ } "
    : > passed
}

# If the certificate cannot be verified, the run ends; --insecure skips the verification.
# not with: SANITIZE, OVER_TLS
t_judge_verifies_the_certificate() {
    tls_provider --require-tls
    run_judge_on_provider 69
    has "$T/err" "^127\\.0\\.0\\.1:$PORT: no TLS that can be trusted: verify error:.*; --ca FILE or --insecure may"
    run_judge_on_provider 0 --insecure --only 5.2.1-b
    equal "$(rows_with pass)" '5.2.1-b '
}

# Our customer passes inside TLS with SCRAM, PLAIN and implicit TLS, and no row passes if it cannot verify the judge.
# not with: SANITIZE, OVER_TLS, BRIEF
t_judge_our_customer_over_tls() {
    local TO_CUSTOMER='--ca "$ODMR_CA"'
    run_judge_on_customer 0 --starttls --mechanism SCRAM-SHA-256 --only 5-a,5.1.2-a,5.1.2-c,5.3-a
    equal "$(rows_with pass)" '5-a 5.1.2-a 5.1.2-c 5.3-a '
    run_judge_on_customer 0 --starttls --mechanism PLAIN --only 5.1.2-a,8-b
    equal "$(rows_with pass)" '5.1.2-a 8-b '
    TO_CUSTOMER+=' --tls'
    run_judge_on_customer 0 --tls --only 5.1.2-a,5.3-b
    equal "$(rows_with pass)" '5.1.2-a 5.3-b '
    TO_CUSTOMER=
    run_judge_on_customer 0 --starttls --only 5.1.2-a
    has "$T/out" '^5\.1\.2-a  prose     '
    equal "$(rows_with pass)" ''
}

# A customer that has a certificate and no secret breaks no MUST. Without the certificate it cannot log in.
# not with: SANITIZE, OVER_TLS, BRIEF
t_judge_our_customer_with_a_certificate() {
    local TO_CUSTOMER='--ca "$ODMR_CA" --mechanism EXTERNAL --cert "$ODMR_CERT"'
    run_judge_on_customer 0 --starttls --mechanism EXTERNAL --atrn-wait 2
    has "$T/out" '^Judged inside TLS, by STARTTLS, with EXTERNAL\.$'
    equal "$(rows_with fail)" ''
    equal "$(rows_with 'not observable')" '5.1.2-c 5.2.1-c '
    TO_CUSTOMER+=' --tls'
    run_judge_on_customer 0 --tls --mechanism EXTERNAL --only 5.1.2-a,5.1.2-f,5.3-b
    equal "$(rows_with pass)" '5.1.2-a 5.1.2-f 5.3-b '
    TO_CUSTOMER='--ca "$ODMR_CA" --tls'
    run_judge_on_customer 69 --tls --mechanism EXTERNAL --only 5.1.2-a
    has "$T/err" '^it did not connect; it said: .* TLS failed$'
    TO_CUSTOMER=${TO_CUSTOMER% --tls}
    run_judge_on_customer 0 --starttls --mechanism EXTERNAL --only 5.1.2-a
    has "$T/out" '^5\.1\.2-a  prose     fail           it left without AUTH, after "STARTTLS"$'
}

# Our customer fails no row. Two rows are not observable in a run without waits.
# not with: SANITIZE, OVER_TLS
t_judge_our_customer() {
    run_judge_on_customer 0 --atrn-wait 2
    equal "$(rows_with fail)" ''
    equal "$(rows_with 'not observable')" '5.1.2-f 5.2.1-c '
    equal "$(rows_with pass)" "4-b 5-a 5-b 5.1.2-a 5.1.2-c 5.1.2-d 5.2.1-l 5.3-a $(printf '5.3-a%d ' {2..7})\
5.3-b 6-a 8-b "
    equal "$(grep -c '^[4-8][0-9.]*-[a-z][2-9]\? ' "$T/out")" 19
    has "$T/out" '^Asked of the other side: 33\.$'
    has "$T/out" '^5\.2\.1-c  MUST      not observable silent for 2 s, and it waited; --atrn-wait 600 decides$'
}

# Each requirement of a side has a judge function, and each judge function has a requirement.
# not with: SANITIZE, OVER_TLS, BRIEF
t_judge_each_requirement() {
    local side id who
    requirements
    for side in provider customer; do
        while read -r id _ who; do
            if judged_here "$side" "$who" "$id"; then echo "judge_${side}_$id"; fi
        done < <(printf '%s\n' "${REQUIREMENTS[@]}")
    done | sort > "$T/wanted"
    equal "$(wc -l < "$T/wanted")" 63
    equal "$(declare -F | sed -n 's/^declare -f \(judge_\(provider\|customer\)_[4-8].*\)/\1/p' | sort |
        diff - "$T/wanted")" ''
}

# The exit code and the message are right without --inject, with no or a busy peer, and with wrong options.
# not with: SANITIZE, OVER_TLS
t_judge_options_and_exits() {
    local bad
    provider
    echo wrong > "$T/wrong"
    run_judge 0 --provider "127.0.0.1:$PORT" --user other --secret-file "$T/wrong" --domains other.example \
        --foreign-domain example.org \
        --only 5.2.1-f,5.3-c
    has "$T/out" '^5\.2\.1-f  MUST      not observable cannot log in by CRAM-MD5: 535 '
    has "$T/out" '^5\.3-c    prose     not observable no mail waits: there is no --inject$'
    run_judge 1 --provider "127.0.0.1:$PORT" --user other --secret-file "$T/wrong" --domains other.example \
        --foreign-domain example.org --only 5.1.2-c
    has "$T/out" '^5\.1\.2-c  MUST      fail           the right response: 535 '
    run_judge 69 --provider 127.0.0.1:1 --user a --secret-file "$T/wrong" --domains a.example --foreign-domain b.example
    run_judge 69 --customer 'echo hello'
    has "$T/err" '^it did not connect; it said: hello$'
    mkdir "$T/bin"
    ln -s "$(type -P sed)" "$T/bin"
    ( needs_judge() { :; }; PATH=$T/bin; run_judge 69 --customer true )
    has "$T/err" ': openssl is not installed, and the judge needs it$'
    mkdir "$T/alone"
    cp "$self" "$T/alone/judge"
    run 69 "$T/alone/judge" --customer true
    has "$T/err" ': the judge needs RFC2645.txt in the same directory$'
    serve peer_busy
    run_judge 75 --provider "127.0.0.1:$PORT" --user a --secret-file "$T/wrong" --domains a.example \
        --foreign-domain b.example
    while read -r bad; do
        eval "run_judge 64 $bad"
        has "$T/err" '^usage: '
    done << 'END'
--frob
--provider --help
--user a
--customer
--customer ''
--customer true --inject true
--customer true --only 5.4-a,4
--customer true --atrn-wait 0
--customer true --report html
--customer true --transcript /nowhere
--provider localhost --customer true
--provider localhost:1 --user a --domains a.example --foreign-domain b.example
--customer true --tls --starttls
--customer true --mechanism LOGIN
--customer true --insecure
--provider localhost:1 --ca /nowhere
--provider localhost:1 --user a --secret-file /nowhere --domains a.example --foreign-domain b.example
--provider localhost:1 --user a --secret-file "$T/wrong" --domains 'a.example, b.example' --foreign-domain b.example
--provider localhost:1 --user a --secret-file "$T/wrong" --domains a.example --foreign-domain b
END
}

# The text of a hostile peer is shown so that it cannot affect a terminal or a table.
# not with: SANITIZE, OVER_TLS
t_judge_prints_nothing_raw() {
    serve peer_hostile
    echo x > "$T/secret"
    run_judge 1 --provider "127.0.0.1:$PORT" --user a --secret-file "$T/secret" --domains a.example \
        --foreign-domain b.example --only 5.2.1-b
    has "$T/out" '^5\.2\.1-b  MUST      fail           "ATRN": 503 \\x1b\[2J | <b>\\x5c\\xe9$'
    run_judge 1 --provider "127.0.0.1:$PORT" --user a --secret-file "$T/secret" --domains a.example \
        --foreign-domain b.example --only 5.2.1-b \
        --report markdown
    has "$T/out" '| fail | "ATRN": 503 \\\\x1b\\\[2J \\| &lt;b>\\\\x5c\\\\xe9 | 530 |$'
    equal "$(tr -d '\n -~' < "$T/out")" ''
}
peer_hostile() {
    say '220 x'; expect_line '^EHLO'; say '250-x'; say '250-AUTH CRAM-MD5'; say '250 ATRN'; expect_line '^ATRN$'
    say $'503 \e[2J | <b>\\\xe9'
}

# The three forms of a report have the same content and the command that made them. The dialogue of each row is in the
# directory of --transcript.
# not with: SANITIZE, OVER_TLS
t_judge_report_stands_alone() {
    local version
    serve peer_hostile
    echo x > "$T/secret"
    set -- --provider "127.0.0.1:$PORT" --user a --secret-file "$T/secret" --domains a.example \
        --foreign-domain b.example --only 5.2.1-b,5.3-b --inject "echo it's"
    version=$(sed -n 's/^#define ODMR_VERSION "\(.*\)"/\1/p' "$here/odmr.c")
    mkdir "$T/transcript"
    run_judge 1 "$@" --transcript "$T/transcript"
    has "$T/out" "^Command: \./test_odmr\.sh --provider 127\.0\.0\.1:$PORT .* --inject 'echo it'\\\\''s'"
    has "$T/out" "^Judged on 20[0-9T:-]*Z by test_odmr\.sh of odmr $version\.\$"
    has "$T/out" '^         5\.2\.1: .*ATRN'
    has "$T/out" '^         expected: 530$'
    has "$T/out" '^Asked of the other side: 1\.$'
    has "$T/transcript/5.2.1-b" '^> ATRN$'
    has "$T/transcript/5.2.1-b" '^< 503 \\x1b'
    run_judge 1 "$@" --report markdown
    has "$T/out" "^Command: \`\./test_odmr\.sh .*\`\$"
    run_judge 1 "$@" --report json
    perl -MJSON::PP -e 'my $r = decode_json(join "", <STDIN>); my $row = $r->{rows}[0];
        $row->{id} eq "5.2.1-b" && $row->{verdict} eq "fail" && $row->{expected} eq "530" &&
            $row->{seen} eq q("ATRN": 503 \x1b[2J | <b>\x5c\xe9) && $row->{requirement} =~ /ATRN/ &&
            $r->{counts}{"MUST fail"} == 1 && @{$r->{rows}} == 1 or exit 1' < "$T/out" || { cat "$T/out"; fail JSON; }
}

# The judge defers mail that it has not sent, so that mail stays queued.
# not with: SANITIZE, OVER_TLS
t_judge_takes_only_its_own() {
    provider
    put_letter one 1.a a@example.edu eva@example.org
    run_judge_on_provider 0 --only 4-e,5.2.1-g,5.2.1-h
    equal "$(rows_with pass)" '4-e '
    has "$T/out" '^5\.2\.1-g  prose     not observable other mail is waiting$'
    equal "$(waiting)" 1
}

# The judge stops waiting for a peer that is silent or whose reply never ends.
# not with: SANITIZE, OVER_TLS, BRIEF
t_judge_waits_for_nobody_without_end() {
    local JUDGE_PATIENCE=3
    serve peer_mute
    echo x > "$T/secret"
    run_judge 0 --provider "127.0.0.1:$PORT" --user a --secret-file "$T/secret" --domains a.example \
        --foreign-domain b.example --only 5.2.1-b
    has "$T/out" '^5\.2\.1-b  MUST      not observable silent for 3 s after "EHLO a.example"$'
    serve peer_endless
    run_judge 0 --provider "127.0.0.1:$PORT" --user a --secret-file "$T/secret" --domains a.example \
        --foreign-domain b.example --only 5.2.1-b
    has "$T/out" '^5\.2\.1-b  MUST      not observable it took longer than 18 s$'
    run_judge 0 --customer 'exec bash -c "exec 3<> /dev/tcp/$ODMR_HOST/$ODMR_PORT; sleep 100"' \
        --only 5.1.2-c
    has "$T/out" '^5\.1\.2-c  MUST      not observable silent for 3 s after "220 judge.example ready"$'
}
peer_mute() { say '220 x'; expect_line '^EHLO'; sleep 10; }
peer_endless() { say '220 x'; expect_line '^EHLO'; while say 250-x 2> /dev/null; do sleep 0.3; done; }

# A mutant is our program with one defect, or with several that do not hide each other. A mutant's list has the rows
# that must fail, and pairs FROM TO. FROM must be in odmr.c exactly once, and the mutant has TO instead. FROM is a
# statement or an expression, unless TO has its own condition with MUTANT. -- separates the lists.
MUTANT_PROVIDERS=(
    5.1.2-a,5.1.3-a,5.2.1-b,5.2.1-f,5.2.1-g,5.2.1-j,6-a
    'return exchange_failed(s, NULL, "501 Authentication cancelled");'
    'return exchange_failed(s, NULL, "250 Authentication cancelled");'
    'reply(s, "5.1.3-a", "221 %s closing connection", s->name);'
    'reply(s, NULL, "250 %s closing connection", s->name);'
    'reply_bad_command(s, "5.2.1-b", "530 Authentication required");'
    'reply_bad_command(s, NULL, "503 Authentication required");'
    'if (!take_asked_domains(s) || asked_too_soon(s)) {'
    'if (MUTANT && !take_asked_domains(s)) { reply(s, NULL, "550 no"); return STAY; }
    if (!take_asked_domains(s) || asked_too_soon(s)) {'
    'reply(s, "5.2.1-g", "453 You have no mail");' 'reply(s, NULL, "550 You have no mail");'
    'reply(s, "5.2.1-j", "250 OK now reversing the connection");'
    'reply(s, NULL, "252 OK now reversing the connection");'
    'reply(s, "5.1.2-a", "334 %s", encoded);' 'reply(s, "5.1.2-a", "334 %s ", encoded);'
    -- 4-e,5.1.1-b,5.2.1-d,5.2.1-e,5.2.1-f,5.3-c
    'to->fate = verdict;' 'to->fate = verdict == REFUSED ? REFUSED : DELIVERED;'
    'reply(s, "5.1.1-b", "250 ATRN");' 'reply(s, NULL, "250 ETRN");'
    's->asked = s->account->domains;' 's->asked = "example.org";'
    '!domain_in_list(s->account->domains, domain, len)' 'false'
    '!message_send(t->message, &x->s->io, dots)' '!message_send(t->message, &x->s->io, false)'
    -- 5-a,5-b,5.1.2-a,5.1.2-b,5.2.1-l,6-a,8-b
    'CRYPTO_memcmp(digest, theirs, 32) == 0 && known' 'known'
    '!mechanism_offered(s, m)' 'm == NO_MECHANISM ? (m = SCRAM, false) : !mechanism_offered(s, m)'
    's->argument && !domain_list_valid(s->argument)'
    '(s->argument && !domain_list_valid(s->argument) ? s->argument = NULL : 0), false'
    'await_replies(&x, 0) && !s->io.broken' 'false'
    -- 5.1.2-c,5.1.3-a,5.2.1-a,5.3-a
    'm < MECHANISMS' 'false'
    $'s->io.said_quit = true;\n    stream_flush(&s->io);\n    return true;' $'stream_flush(&s->io);\n    return false;'
    's->argument && !domain_list_valid(s->argument)' 's->argument != NULL'
    'if (!read_reply(s, "5.3-b", &r))
        return false;
    if (r.code == 220) {' 'if (!MUTANT && !read_reply(s, "5.3-b", &r))
        return false;
    if (MUTANT || r.code == 220) {'
    -- 5.1.1-b,5.3-c
    'reply(s, "5.1.1-b", "250-AUTH%s", list);' ''
    'command(x->s, "5.3-c", "RCPT TO:<%s>", to->address);'
    'command(x->s, "5.3-c", "RCPT TO:<postmaster@%s>", mailbox_domain(to->address));'
)
MORE_MUTANT_PROVIDERS=(
    4-b 'authenticated_state(s) == GO_ON' 'authenticated_state(s) == END'
    -- 4-d 'authenticated_state(s) == GO_ON' '(s->argument = NULL, atrn_command(s) == GO_ON)'
    -- 4-c,5.2-a $'\n        if (verb_is(s, "ATRN")) {' $'\n        if (verb_is(s, MUTANT ? "ETRN" : "ATRN")) {'
    -- 5.1-a 'if (!s->greeted) {' 'if (MUTANT ? s->greeted : !s->greeted) {'
    -- 5.1.1-a 'reply(s, "5.1.1-b", "250-AUTH%s", list);' 'reply(s, NULL, "251-AUTH%s", list);'
    -- 5.1.2-c 'known ? account->secret : NOBODYS_SECRET' 'NOBODYS_SECRET'
)
MUTANT_CUSTOMERS=(
    5-a,5.2.1-c,5.2.1-l,6-a,8-b
    'return EXIT_NO_MAIL;' 'return EX_OK;'
    's->io.timeout = ATRN_TIMEOUT;' 's->io.timeout = 1;'
    'command(s, *c->domains ? "5.2.1-a" : "5.2.1-d", "ATRN%s%s", '
    'command(s, NULL, MUTANT ? "ATRN%s%s " : "ATRN%s%s", '
    'p += strspn(p, " ");' ''
    'reply_offers(r, "AUTH", mechanism_name(m))'
    'reply_keyword(r, "AUTH") &&
    strncasecmp(reply_keyword(r, "AUTH"), mechanism_name(m), strlen(mechanism_name(m))) == 0'
    -- 5-a,5-b
    'return r->code == 235 ? EX_OK : exit_code_refused(s, "AUTH", r, EX_NOPERM);' 'return EX_OK;'
    'hello_command(server);' 'hello_command(server); server->done = true;'
    -- 4-b,5.3-a,5.3-b 'receiver->session ? hand_session_on(s, c, receiver) : take_mail_ourselves(s, c)' 'EX_OK'
    -- 5.3-b 'answer(server, "5.3-b", "220 %s ready to receive email", s->name);' ''
    -- 5.3-a,5.3-b 'answer(server, "5.3-b", "220 %s ready to receive email", s->name);'
    'answer(server, NULL, "EHLO %s", s->name);'
    -- 5.1.2-a 'base64_encode(encoded, response, strlen(response));'
    'snprintf(encoded, sizeof encoded, "%s", response);'
    -- 5.1.2-c 'cram_md5_digest(digest, c->secret, s->response)' 'cram_md5_digest(digest, c->user, s->response)'
)
# Mutants that fail the rows with several messages, sessions or lost connections.
MUTANTS_OF_MANY=(
    4-e4,4-e5,4-e6,5.2.1-e2,5.2.1-e3
    'flock(m->fd, LOCK_EX | LOCK_NB) < 0' 'false'
    'r->fate == ACCEPTED || (r->fate == OWED && (s->io.broken || x->abandoned))'
    's->io.broken ? (r->fate = DELIVERED, false) : r->fate == ACCEPTED'
    'done = done && hand_over_notice(p, notice, m, s);' 'done = true;'
    'command(x->s, "5.3-c", "RCPT TO:<%s>", to->address);'
    'command(x->s, NULL, "RCPT TO:<%s>", x->s->messages > 0 ? "judge@other.example" : to->address);'
    's->asked = s->account->domains;' 's->asked = "other.example,example.org,example.com";'
    -- 4-e2,5.2.1-h2
    'good && !x.over' 'good && !x.over && s->messages == 0'
    $'if (got == BUSY) {\n        log_event(s, LOG_WARNING, "ATRN' 'if (MUTANT && got == BUSY) {
        struct reply r;
        reply(s, NULL, "250 turn"); read_reply(s, NULL, &r); command(s, NULL, "QUIT"); stream_flush(&s->io);
        return END;
    }
    if (got == BUSY) {
        log_event(s, LOG_WARNING, "ATRN'
)
MUTANTS_WITH_STARTTLS=(4-e3 'good && !x.over' 'good && !x.over && (s->messages == 0 || !s->io.tls)')
MUTANTS_OVER_TLS=(
    5.1.2-b,5.2.1-f
    'CRYPTO_memcmp(stored, v->keys.stored, sizeof stored) == 0' 'true'
    '!domain_in_list(s->account->domains, domain, len)' 'false'
)
MORE_MUTANT_CUSTOMERS=(
    5.3-a2,5.3-a5,5.3-a6
    'answer_when_stored(server);' 'if (MUTANT && server->messages > 0) { answer(server, NULL, "250 lost");
        server->messages++; } else answer_when_stored(server);'
    'fwrite(data, 1, len, c->deliveries[i].file);'
    'for (size_t j = 0; j < len; j++) fputc(data[j] & 0x7f, c->deliveries[i].file);'
    'c->after_cr != lf' 'false'
    'c->after_cr && lf' 'lf'
    -- 5-a,5.3-a3,5.3-a4
    'return r->code == 235 ? EX_OK : exit_code_refused(s, "AUTH", r, EX_NOPERM);' 'return EX_OK;'
    'begin_content(server, false);' 'begin_content(server, true);'
    'if (!s->io.broken)
        store_then_answer(server);' 'if (MUTANT || !s->io.broken)
        store_then_answer(server);'
    'stream_end_input(&s->io); /* what comes later would be content, not a command */
            return false;' 'stream_end_input(&s->io);
            if (!MUTANT) return false; return true;'
)
# This mutant is lawful. It differs from our program in all that the standard leaves open.
LAWFUL_STRANGER=(none
    'reply(s, "5.1", "220 %s on-demand mail relay server ready", s->name);'
    'reply(s, NULL, "220-%s"); reply(s, NULL, "220 come in");'
    'reply(s, "5.1.1-a", "250-%s", s->name);'
    'reply(s, NULL, "250-hello there"); reply(s, NULL, "250-x-odd 1 2 3"); reply(s, NULL, "250-atrn");
    reply(s, NULL, "250-PIPELINING");'
    'reply(s, "5.1.1-b", "250-AUTH%s", list);' 'reply(s, NULL, "250-auth%s", list);'
    'reply(s, "5.1.1-b", "250 ATRN");' 'reply(s, NULL, "250 HELP");'
    'reply(s, "5.1.2-b", "235 now authenticated as %s", account->name);'
    'reply(s, NULL, "235-2.7.0"); reply(s, NULL, "235");'
    'reply_bad_command(s, "5.2.1-b", "530 Authentication required");' 'reply_bad_command(s, NULL, "530"); return END;'
    's->auth_failures < AUTH_FAILURES' 'false'
    'return exchange_failed(s, NULL, "501 Authentication cancelled");'
    'return reply_bad_command(s, NULL, "501 5.7.0 well then"), END;'
    'verb_is(s, "NOOP") ||' '!MUTANT && verb_is(s, "NOOP") ||'
    'reply(s, "5.2.1-g", "453 You have no mail");'
    'reply(s, NULL, "250-why not"); reply(s, NULL, "250 turn"); return GO_ON;'
    'reply(s, "5.2.1-j", "250 OK now reversing the connection");' 'reply(s, NULL, "250");'
)
# This mutant requires a domain with each ATRN, as indimail-mta does.
WITHOUT_BARE_ATRN=(5.2.1-d
    's->postponed = "a domain cannot be read";'
    'if (MUTANT && !s->argument) { reply(s, NULL, "553 which domain?"); return STAY; }
    s->postponed = "a domain cannot be read";'
)

# mutants LIST: sets ODMR to the program with all mutants, which the first caller makes. The number ODMR_MUTANT selects
# a mutant; it is set to the first of LIST. ROWS_OF has the rows of each mutant of LIST.
mutants() {
    local list word ids
    [ -x "$SCRATCH/mutant" ] || ( flock 9; [ -x "$SCRATCH/mutant" ] || make_mutants ) 9> "$SCRATCH/lock.mutant" ||
        exit 1
    ODMR=$SCRATCH/mutant
    export ODMR_MUTANT=1
    for list in MUTANT_PROVIDERS MORE_MUTANT_PROVIDERS MUTANT_CUSTOMERS LAWFUL_STRANGER WITHOUT_BARE_ATRN \
        MUTANTS_OF_MANY MUTANTS_WITH_STARTTLS MUTANTS_OVER_TLS MORE_MUTANT_CUSTOMERS; do
        local -n words=$list
        ROWS_OF=() ids=1
        for word in "${words[@]}"; do
            if [ -n "$ids" ]; then ROWS_OF+=("$word"); ids=; elif [ "$word" = -- ]; then ids=1; fi
        done
        [ "$list" != "$1" ] || break
        ODMR_MUTANT=$((ODMR_MUTANT + ${#ROWS_OF[@]}))
    done
}
make_mutants() {
    perl -e 'my $c = do { local $/; <STDIN> }; my ($k, $original) = (0, $c); unshift @ARGV, "--";
        while (defined(my $from = shift)) {
            if ($from eq "--") { $k++; shift; next }
            my $to = shift; my $n = () = $original =~ /\Q$from\E/g;
            $n == 1 or die "$n times in odmr.c: $from\n";
            if ($to =~ s/\bMUTANT\b/(mutant == $k)/g) { }
            elsif ($from =~ /;$/) { $to = "{ if (mutant == $k) { $to } else { $from } }" }
            else { $to = "((mutant == $k) ? ($to) : ($from))" }
            $c =~ s/.*\K\Q$from\E/$to/s or die "an earlier edit is in the way of: $from\n";
            # the last: an earlier mutant may say it too
        }
        print "#define mutant atoi(getenv(\"ODMR_MUTANT\"))\n", $c' -- \
        "${MUTANT_PROVIDERS[@]}" -- "${MORE_MUTANT_PROVIDERS[@]}" -- "${MUTANT_CUSTOMERS[@]}" \
        -- "${LAWFUL_STRANGER[@]}" -- "${WITHOUT_BARE_ATRN[@]}" \
        -- "${MUTANTS_OF_MANY[@]}" -- "${MUTANTS_WITH_STARTTLS[@]}" -- "${MUTANTS_OVER_TLS[@]}" \
        -- "${MORE_MUTANT_CUSTOMERS[@]}" \
        < "$here/odmr.c" > "$SCRATCH/mutant.c" ||
        fail 'an edit that breaks odmr.c no longer fits it'
    ${CC:-cc} -std=gnu11 -O0 -w -I "$here" -o "$SCRATCH/mutant" "$SCRATCH/mutant.c" -lssl -lcrypto -pthread ||
        fail 'the mutants do not compile'
}
# breach IDS: true if one of these requirements is a MUST or MUST NOT.
breach() {
    local requirement
    requirements
    for requirement in "${REQUIREMENTS[@]}"; do
        [[ ,$1, != *",${requirement%% *},"* || $requirement != *' '[MN]' '* ]] || return 0
    done
    return 1
}
# fails_rows IDS: checks that the report has a failure in each of these rows.
fails_rows() {
    local id
    for id in ${1//,/ }; do match "$(< "$T/out")" $'\n'"$id  *[MTUSNOprose ]*fail  *[^ ]" "row $id"; done
}
# caught SIDE LIST: checks that each of these mutants fails its rows.
caught() {
    needs_judge
    local ODMR PROVIDER JUDGE_PATIENCE=6 ids code
    mutants "$2"
    for ids in "${ROWS_OF[@]}"; do
        code=0
        if breach "$ids"; then code=1; fi
        "mutant_$1" "$code" "$ids"
        fails_rows "$ids"
        ODMR_MUTANT=$((ODMR_MUTANT + 1))
    done
}
mutant_provider() {
    rm -rf "$T/queue"
    provider "${MUTANT_OPTIONS[@]}"
    run_judge_on_provider "$1" --only "$2" "${JUDGE_OPTIONS[@]}"
    kill -9 "$PROVIDER"
}
MUTANT_OPTIONS=() JUDGE_OPTIONS=()
mutant_customer() { run_judge_on_customer "$1" --only "$2" --atrn-wait 3 "${JUDGE_OPTIONS[@]}"; }

# Each defect of a provider in the first list fails the rows that it breaks.
# not with: SANITIZE, OVER_TLS, BRIEF
t_mutants_of_the_provider() {
    caught provider MUTANT_PROVIDERS
}

# Each defect of a provider in the second list fails the rows that it breaks.
# not with: SANITIZE, OVER_TLS, BRIEF
t_mutants_of_the_provider_2() {
    caught provider MORE_MUTANT_PROVIDERS
}

# Each defect that shows only with several messages, sessions or a lost connection fails its rows.
# not with: SANITIZE, OVER_TLS, BRIEF
t_mutants_of_many_messages() {
    local MUTANT_OPTIONS=() JUDGE_OPTIONS=()
    authority
    mutants_of_many
    MUTANT_OPTIONS=(--cert "$T/server.pem")
    caught provider MUTANTS_WITH_STARTTLS
}

# The mutants of TLS and those of several messages also fail their rows inside TLS, with SCRAM.
# not with: SANITIZE, OVER_TLS, BRIEF
t_mutants_over_tls() {
    local MUTANT_OPTIONS JUDGE_OPTIONS
    authority
    MUTANT_OPTIONS=(--cert "$T/server.pem" --require-tls)
    JUDGE_OPTIONS=(--ca "$T/ca.crt" --mechanism SCRAM-SHA-256)
    caught provider MUTANTS_OVER_TLS
    mutants_of_many
}
mutants_of_many() {
    notices_into_a_directory
    JUDGE_OPTIONS+=(--other-user other --other-secret-file "$T/other" --notice-dir "$T/notices")
    caught provider MUTANTS_OF_MANY
}

# Each defect of a customer in the first list fails the rows that it breaks.
# not with: SANITIZE, OVER_TLS, BRIEF
t_mutants_of_the_customer() {
    caught customer MUTANT_CUSTOMERS
}

# Each defect of a customer in the second list fails the rows that it breaks.
# not with: SANITIZE, OVER_TLS, BRIEF
t_mutants_of_the_customer_2() {
    caught customer MORE_MUTANT_CUSTOMERS
}

# The defects of the second list also fail their rows inside TLS.
# not with: SANITIZE, OVER_TLS, BRIEF
t_mutants_of_the_customer_over_tls() {
    local TO_CUSTOMER='--ca "$ODMR_CA"' JUDGE_OPTIONS=(--starttls)
    caught customer MORE_MUTANT_CUSTOMERS
}

# A provider that differs from our program in all that the standard leaves open fails no row.
# not with: SANITIZE, OVER_TLS, BRIEF
t_judge_a_lawful_stranger() {
    local ODMR
    mutants LAWFUL_STRANGER
    provider
    run_judge_on_provider 0
    equal "$(rows_with fail)" ''
    equal "$(rows_with 'not observable')" '4-a 4-d 4-e3 4-e6 5.1.2-f 5.2.1-e3 5.2.1-k 8-a '
    has "$T/out" '^5\.2\.1-g  prose     pass           250, then QUIT (5\.2\.1-h)$'
    has "$T/out" '^5\.2\.1-h  MAY       pass           no mail: 250, then QUIT after EHLO$'
}

# Writes a provider and a customer in perl that share no code with our program and differ where the RFC allows it.
lawful_strangers() {
    needs_judge
    cat > "$T/stranger.pm" << 'END'
package stranger; use strict; use IO::Socket::INET; use MIME::Base64; use Digest::MD5 qw(md5 md5_hex);
our $s; $SIG{CHLD} = $SIG{PIPE} = "IGNORE";
sub said { print $s map { "$_\r\n" } @_; $s->flush }
sub heard { my $l = <$s>; defined $l or return undef; $l =~ s/\r?\n\z//; $l }
sub reply { my $l; do { $l = heard() // return "" } while $l =~ /^...-/; substr $l, 0, 3 }
sub cram { my ($key, $challenge) = @_; $key .= "\0" x (64 - length $key);
    md5_hex(($key ^ "\x5c" x 64) . md5(($key ^ "\x36" x 64) . $challenge)) }
1;
END
    cat > "$T/provider.pl" << 'END'
use strict; use stranger; use IO::Socket::INET; use MIME::Base64;
my ($dir) = @ARGV;
my %account = ("example.org" => ["tanstaaf", "example.org", "example.com"],
    other => ["another secret: with colons", "other.example"]);
my $listener = IO::Socket::INET->new(LocalAddr => "127.0.0.1", Listen => 99) or die;
open my $port, ">", "$dir/port.new" or die; print $port $listener->sockport, "\n"; close $port;
rename "$dir/port.new", "$dir/port";
while (1) { $stranger::s = $listener->accept or next; last unless fork; close $stranger::s }
close $listener;
sub said { stranger::said(@_) } sub heard { stranger::heard() } sub reply { stranger::reply() }
my $user;
said("220-a stranger", "220 come in");
while (defined($_ = heard())) {
    if (/^EHLO \S/i) { said("250-hello", "250-x-odd a b", "250-auth x-more cram-md5", "250 atrn") }
    elsif (/^QUIT$/i) { said("221"); exit }
    elsif (/^AUTH CRAM-MD5$/i && !$user) {
        my $challenge = "<$$." . time . '@stranger>';
        said("334 " . encode_base64($challenge, ""));
        my $text = heard() // exit;
        if ($text !~ m{^[A-Za-z0-9+/]+=*$}) { said("501-5.5.2", "501"); exit }
        my ($name, $digest) = decode_base64($text) =~ /^(.*) (\S+)$/s;
        if ($account{$name} && stranger::cram($account{$name}[0], $challenge) eq $digest) { $user = $name; said("235") }
        else { said("535"); exit }
    }
    elsif (/^AUTH /i) { said($user ? 503 : 504) }
    elsif (/^ATRN/i && !$user) { said("530-5.7.0", "530 5.7.0") }
    elsif (/^ATRN$/i) { turn(@{$account{$user}}[1 .. $#{$account{$user}}]) }
    elsif (/^ATRN ((?:[a-z0-9][a-z0-9-]*\.)+[a-z0-9]+(?:,(?:[a-z0-9][a-z0-9-]*\.)+[a-z0-9]+)*)$/i) {
        my @asked = split /,/, lc $1; my %mine = map { $_ => 1 } @{$account{$user}}[1 .. $#{$account{$user}}];
        if (grep { !$mine{$_} } @asked) { said("450") } else { turn(@asked) }
    }
    else { said("500") }
}
# Newest first, with HELO, and RSET before each message; what another session has is not waited for.
sub turn {
    my %asked = map { $_ => 1 } @_; my $over;
    said("250-why", "250 not");
    reply() eq "220" or exit; said("HELO stranger"); reply();
    for my $file (sort { -M $a <=> -M $b } glob "$dir/mail/*.m") {
        rename $file, "$file.$$" or next;
        open my $in, "<", "$file.$$" or die; my ($from, $to, @text) = <$in>; chomp($from, $to);
        my @mine = grep { /\@(.*)/ && $asked{lc $1} } split / /, $to; my ($code, $verdict) = ("", "");
        my @rest = grep { my $r = $_; !grep { $_ eq $r } @mine } split / /, $to;
        if (@mine && !$over) {
            said("RSET"); reply(); said("MAIL FROM:<$from>"); reply(); my $taken = 0;
            for (@mine) { said("RCPT TO:<$_>"); $code = reply(); $taken++ if $code =~ /^2/ }
            if ($taken) {
                said("DATA"); $code = reply();
                for (@text) { chomp; s/^\./../; said($_) }
                said("."); $code = reply();
            }
            if ($code =~ /^5/) { open my $notice, ">", "$dir/notices/$$" or die; print $notice map { "$_\n" } @text }
            $over = 1 if $code eq "";
        }
        if ($code =~ /^[25]/ && !@rest) { unlink "$file.$$"; next }
        if ($code =~ /^[25]/) {
            open my $out, ">", "$file.$$" or die; print $out "$from\n@rest\n", map { chomp; "$_\n" } @text; close $out;
        }
        rename "$file.$$", $file;
    }
    said("QUIT"); reply(); exit;
}
END
    cat > "$T/inject.sh" << 'END'
name=$1/mail/$(date +%s%N)
{ echo "$ODMR_SENDER"; echo "$ODMR_RECIPIENTS"; cat; } > "$name.new" && mv "$name.new" "$name.m"
END
    cat > "$T/customer.pl" << 'END'
use strict; use stranger; use IO::Socket::INET; use MIME::Base64;
$stranger::s = IO::Socket::INET->new(PeerAddr => $ENV{ODMR_HOST}, PeerPort => $ENV{ODMR_PORT}) or exit 69;
sub said { stranger::said(@_) } sub heard { stranger::heard() } sub reply { stranger::reply() }
my ($n, %mine) = (0, map { $_ => 1 } split /,/, $ENV{ODMR_DOMAINS});
exit 75 if reply() ne "220"; said("ehlo stranger"); reply(); said("auth cram-md5");
$_ = heard(); /^334 (\S+)$/ or exit 77;
said(encode_base64("$ENV{ODMR_USER} " . stranger::cram($ENV{ODMR_SECRET}, decode_base64($1)), ""));
exit 77 if reply() ne "235";
said("atrn $ENV{ODMR_DOMAINS}"); reply() eq "250" or exit 1;
said("220-a stranger", "220");
while (defined($_ = heard())) {
    if (/^QUIT$/i) { said("221"); exit }
    elsif (/^RCPT TO: ?<[^>]*\@([^>]*)>/i) { said($mine{lc $1} ? "251-2.1.5" : (), $mine{lc $1} ? "251" : "550 5.7.1") }
    elsif (/^DATA$/i) {
        said("354"); my $text = ""; my $bare = 0;
        while (1) { my $l = readline $stranger::s // exit 75; last if $l eq ".\r\n"; $bare |= $l !~ /\r\n\z/;
            $l =~ s/^\.//; $text .= $l }
        if ($bare) { said("554"); next }
        open my $out, ">", "$ENV{ODMR_SCRATCH}/" . ++$n or exit 73; print $out $text; close $out; said("250");
    }
    elsif (/^(EHLO|HELO|MAIL|RSET|NOOP)/i) { said("250-so", "250 be it") }
    else { said("502") }
}
END
}
# This provider is lawful, so a row that fails is an error of the judge.
# not with: SANITIZE, OVER_TLS, BRIEF
t_judge_a_provider_of_other_making() {
    export PERL5LIB=$T
    lawful_strangers
    mkdir "$T/mail" "$T/notices"
    perl "$T/provider.pl" "$T" & STARTED+=($!)
    until_true [ -s "$T/port" ]
    PORT=$(< "$T/port")
    run_judge_on_provider 0 --inject "sh '$T/inject.sh' '$T'" --notice-dir "$T/notices" \
        --other-user other --other-secret-file "$T/other"
    equal "$(rows_with fail)" ''
    equal "$(rows_with 'not observable')" '4-a 4-d 4-e3 5.1.2-f 5.2.1-k 8-a '
    equal "$(how_many '"$T"/mail/*')" 0
}

# This customer is lawful, so a row that fails is an error of the judge.
# not with: SANITIZE, OVER_TLS, BRIEF
t_judge_a_customer_of_other_making() {
    export PERL5LIB=$T
    lawful_strangers
    run_judge 0 --customer "perl '$T/customer.pl'" --atrn-wait 2
    equal "$(rows_with fail)" ''
    equal "$(rows_with 'not observable')" '5.1.2-f 5.2.1-c '
}

# If a provider refuses ATRN without domains, only the row about that fails, and the other rows name a domain.
# not with: SANITIZE, OVER_TLS, BRIEF
t_judge_one_cause_is_one_failure() {
    local ODMR
    mutants WITHOUT_BARE_ATRN
    provider
    run_judge_on_provider 0 --only 4-b,4-c,4-e,5.2-a,5.2.1-a,5.2.1-d,5.2.1-g,5.2.1-h,5.3-c,6-a,7-a
    equal "$(rows_with fail)" '5.2.1-d '
    equal "$(rows_with 'not observable')" ''
    has "$T/out" '^ATRN without domains is refused (553 which domain?), so other rows name a domain\.$'
}

# ---- The runner --------------------------------------------------------------------------------------

# all_tests: prints the names of the tests for this run. "# not with: SANITIZE, OVER_TLS" above a test leaves it out:
#   SANITIZE  memory figures mean nothing, the judge is not our program, the library of failing calls cannot be loaded
#   OVER_TLS  the test is about TLS itself, or needs the peer at the end of the connection, not the tunnel
#   BRIEF     the test is long, and a bare machine makes no difference to it
all_tests() {
    local left_out=nothing
    [ -z "${SANITIZED:-}" ] || left_out='SANITIZE'
    [ -z "${OVER_TLS:-}" ] || left_out='OVER_TLS'
    [ -z "${BRIEF:-}" ] || left_out='BRIEF'
    awk -v left_out="$left_out" '/^# not with: / { not_with = substr($0, 13) }
        /^t_[^ ()]*\(\) \{$/ { if (not_with !~ left_out) print substr($0, 1, index($0, "(") - 1) }
        /^t_|^$/ { not_with = "" }' "$self"
}
# The long tests come first, so that none of them runs alone at the end.
long_ones_first() {
    local long='bench|mutants|judge|readme|_fills_|_hands_on_|fetchmail|megabytes|exactly|4-e_mail|memory|plain_by_hand'
    long+='|scram|verifier_is|silence|broken'
    awk -v long="$long" '$0 ~ long { print; next } { rest = rest $0 "\n" } END { printf "%s", rest }'
}
list_tests() {
    awk '/^# shows:/ { ids = substr($0, 10) } /^t_[^ ]*\(\) \{$/ { sub(/\(\).*/, ""); printf "%-58s%s\n", $0, ids;
        ids = "" }' "$self"
}

# Sets MISSING to the programs that some tests need and this machine lacks, as one with only the demo's packages does.
OPTIONAL=(openssl socat spin unbuffer faketime tshark fetchmail postfix smtp-sink smtp-source swaks gsasl adduser
    systemd-analyze chattr mandoc)
look_for_what_is_missing() {
    local name
    MISSING=
    for name in "${OPTIONAL[@]}"; do
        PATH=$PATH:/usr/sbin:/sbin command -v "$name" > /dev/null || MISSING+=", $name"
    done
    perl -MDigest::MD5 -MDigest::SHA -MMIME::Base64 -e 1 2> /dev/null || MISSING+=", perl's Digest::MD5"
    MISSING=${MISSING#, }
    export MISSING
}
# missing NAME: if MISSING has NAME, this test is skipped, whichever of its processes needs NAME.
missing() {
    [[ ", $MISSING, " == *", $1, "* ]] || return 0
    echo "$1 is not installed" > "$TEST_SKIPPED"
    kill -USR1 "$TEST"
}
# bash calls this function if a command is not found.
command_not_found_handle() {
    missing "$1"
    echo "$1: command not found" >&2
    return 127
}

# scratch NAME...: makes SCRATCH, with a directory for each of these tests. SCRATCH is removed when this shell ends. The
# environment set here is for tests only, not for the programs that the judge starts.
scratch() {
    export SSL_CERT_FILE=/dev/null SSL_CERT_DIR=/dev/null # reading the system's authorities takes longer than a session
    umask 022
    SCRATCH=$(mktemp -d "${TMPDIR:-/tmp}/odmr-test-XXXXXX")
    trap 'rm -rf "$SCRATCH"' EXIT
    mkdir "${@/#/$SCRATCH/}"
    sendmail_stub
    look_for_what_is_missing
}
# run_one NAME: runs one test in this process. The exit code says if the test passed (0), was skipped (77) or failed.
run_one() {
    local code=0
    export T=$SCRATCH/$1
    STARTED=()
    (
        export TEST=$BASHPID TEST_SKIPPED=$T/skipped
        trap 'exit 77' USR1
        trap 'for p in "${STARTED[@]}"; do kill -9 "$p" 2> /dev/null; done; wait 2> /dev/null' EXIT
        cd "$T" && "$1" && lawful_sessions
    ) > "$T/.output" 2>&1 < /dev/null
    code=$?
    [ $code = 0 ] || chattr -R -a "$T" 2> /dev/null # otherwise the directory cannot be removed
    case $code in
    0) content "$T/covered"; echo "ok      $1${CONTENT:+: ${CONTENT%$'\n'}}" ;;
    77) echo "skipped $1: $(cat "$T/skipped")" ;;
    *)  printf 'FAILED  %s\n%s\n' "$1" "$(tail -n 60 "$T/.output" | sed 's/^/        /')"
        [ -z "${KEEP:-}" ] || { cp -r "$T" "$KEEP/"; } ;;
    esac
    return $code
}

# suite NAME...: runs these tests, JOBS at a time, each in its own shell and process group. A test reports its end over
# a pipe. If a test takes longer than LIMIT seconds, the suite ends it.
LIMIT=600
suite() {
    local TEST_NAME
    local -A BEGAN=() GONE=() NAME_OF=() COUNT=([0]=0 [77]=0 [1]=0)
    local LEFT=() RECORD=
    set -m
    exec {OVER}<> <(:) {NEVER}<> <(:)
    scratch "$@"
    [ -z "$MISSING" ] ||
        echo "not installed: $MISSING; what needs them is skipped (README, \"Run the tests\", names the packages)"
    trap 'end_tests "${!BEGAN[@]}"; exit 130' INT TERM
    for TEST_NAME; do
        while [ ${#BEGAN[@]} -ge "$JOBS" ]; do one_over; done
        { run_one "$TEST_NAME"; echo "$BASHPID $?" >&"$OVER"; } &
        BEGAN[$!]=$SECONDS NAME_OF[$!]=$TEST_NAME
    done
    while [ ${#BEGAN[@]} -gt 0 ]; do one_over; done
    echo "${COUNT[0]} passed, ${COUNT[1]} failed$([ "${COUNT[77]}" = 0 ] || echo ", ${COUNT[77]} skipped")"
    [ "${COUNT[1]}" = 0 ]
}
one_over() {
    local pid code record
    if IFS= read -r -t 5 record <&"$OVER"; then
        record=$RECORD$record RECORD=
        pid=${record% *} code=${record#* }
        [[ $code == 0 || $code == 77 ]] || code=1
        COUNT[$code]=$((COUNT[$code] + 1))
        unset "BEGAN[$pid]"
        LEFT+=("$SCRATCH/${NAME_OF[$pid]}")
        [ ${#LEFT[@]} -lt 20 ] || { rm -rf "${LEFT[@]}"; LEFT=(); }
        return
    fi
    RECORD+=$record # the time-out may come in the middle of a line
    for pid in "${!BEGAN[@]}"; do
        if kill -0 "$pid" 2> /dev/null && [ $((SECONDS - BEGAN[$pid])) -lt "$LIMIT" ]; then continue; fi
        if [ -z "${GONE[$pid]:-}" ]; then GONE[$pid]=$SECONDS; continue; fi # the test may have just reported its end
        end_tests "$pid"
        echo "FAILED  ${NAME_OF[$pid]}: ended after $((SECONDS - BEGAN[$pid])) s"
        COUNT[1]=$((COUNT[1] + 1))
        unset "BEGAN[$pid]"
    done
}
# end_tests PID...: ends these tests with all processes that they have started.
end_tests() {
    local pid
    for pid; do kill -TERM -- "-$pid"; done 2> /dev/null
    moment 1
    for pid; do kill -KILL -- "-$pid"; done 2> /dev/null
}

# If a signal is ignored when bash starts, as under nohup, it stays ignored in bash and in all processes that bash
# starts. So perl sets each signal to its default and starts this program again.
default_signals() {
    local key mask
    while read -r key mask; do
        [[ $key != SigIgn: && $key != SigBlk: ]] || (((16#$mask & 0x7fffffff) == 0)) || [ -n "${ODMR_SIGNALS:-}" ] ||
            ODMR_SIGNALS=default exec perl -MPOSIX=:signal_h -e 'sigprocmask(SIG_SETMASK, POSIX::SigSet->new);
                $SIG{$_} = "DEFAULT" for keys %SIG; exec @ARGV' bash "$self" "$@"
    done < /proc/self/status
    unset ODMR_SIGNALS
}

# shellcheck source=.ci/torture
read_torture() { . "$here/.ci/torture"; }

main() {
    local name tests=()
    [ "${1:-}" = --peer ] || default_signals "$@"
    case ${1:-} in
    --list) list_tests; exit ;;
    -h | --help) sed -n '2,/^set -u/s/^# \{0,1\}//p' "$self"; exit ;;
    --one) read_torture; scratch "$2"; run_one "$2"; exit ;;
    --peer) declare -F "$3" > /dev/null || read_torture; run_peer "$2" "$3"; exit ;;
    --torture) shift; read_torture; torture "$@" < /dev/null; exit ;;
    -*) judge "$@"; exit ;;
    esac
    [ -x "$ODMR" ] || { echo "$ODMR is not there; run make first" >&2; exit 2; }
    for name; do
        declare -F "$name" > /dev/null || { echo "$name: no such test; see $0 --list" >&2; exit 64; }
        tests+=("$name")
    done
    [ $# -gt 0 ] || mapfile -t tests < <(all_tests | long_ones_first)
    suite "${tests[@]}" < /dev/null
}

main "$@"
