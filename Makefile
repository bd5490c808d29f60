# make            ./odmr                      make demo       a whole session on this machine
# make check      the tests                   make install    PREFIX=/usr/local DESTDIR=
# make check SANITIZE=address|thread          make bench      how fast it is
# make torture    cuts, kills, failures, hostile peers; TIME=SECONDS for how long
# make fuzz       TIME=SECONDS or RUNS=N, TARGETS="provider message ..." of .ci/fuzz.c; needs clang
# make model      .ci/odmr.pml, checked by spin; CHECKS="window ..." of .ci/model: these only
# make coverage   what the tests execute of odmr.c; needs clang and llvm
# make uninstall, make clean, make help

CC       = cc
PREFIX   = /usr/local
UNITS    = $(PREFIX)/lib/systemd/system
MAN      = $(PREFIX)/share/man
MANUALS  = build/man/man1/odmr.1 build/man/man5/odmr-accounts.5 build/man/man5/odmr-queue.5
CFLAGS   = -O2 -g
WARNINGS = -Wall -Wextra -Wshadow -Wstrict-prototypes -Wpointer-arith -Wvla -Wformat=2 -Werror=format-security
HARDEN   = -fstack-protector-strong -fPIE $(call known,-fstack-clash-protection) $(call known,-fcf-protection) \
           $(or $(call known,$(fortify)3),$(call known,$(fortify)2))
fortify  = -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=
HARDEN_LD = -pie -Wl,-z,relro,-z,now
LIBS     = -lssl -lcrypto -pthread
COMPILE  = $(CC) -std=gnu11 $(WARNINGS) $(CFLAGS)
# The flag if this compiler takes it for this machine without a warning, else nothing.
known    = $(shell echo '$(hash)include <stdio.h>' | $(CC) $(CFLAGS) -Werror $(1) -fsyntax-only -xc - 2> /dev/null && \
             echo '$(1)')
# The proof that this compiler can build odmr; see there.
CHECKED  = build/checked-$(subst /,-,$(subst $(space),,$(CC)))
space    := $(subst ,, )
sanitizers = $(if $(filter address,$(SANITIZE)),address$(comma)undefined,$(SANITIZE))
comma    := ,
hash     := \#

.DELETE_ON_ERROR:
.PHONY: all demo check coverage torture fuzz model bench install uninstall clean help

all: odmr

# ---- For systemd ----
#
# The provider starts as root and becomes odmr by itself, for under User= systemd would forbid set-group-ID
# programs, and Postfix's sendmail, which takes the notices, is one.

define provider_unit
[Unit]
Description=On-Demand Mail Relay (RFC 2645): provider
After=network-online.target
Wants=network-online.target

[Service]
EnvironmentFile=-/etc/odmr/provider
ExecStart=$(PREFIX)/bin/odmr provider --user odmr $$PROVIDER_OPTIONS
ExecReload=+/bin/sh -c 'kill -HUP $$MAINPID'
Restart=on-failure
TimeoutStopSec=330
LimitNOFILE=65536
CapabilityBoundingSet=CAP_NET_BIND_SERVICE CAP_SETUID CAP_SETGID CAP_DAC_READ_SEARCH
ProtectSystem=full
$(hardening)

[Install]
WantedBy=multi-user.target
endef

define customer_unit
[Unit]
Description=On-Demand Mail Relay (RFC 2645): customer
After=network-online.target
Wants=network-online.target

[Service]
User=odmr
EnvironmentFile=/etc/odmr/customer
LoadCredential=secret:/etc/odmr/secret
ExecStart=$(PREFIX)/bin/odmr customer --quiet --poll 600 --secret-file %d/secret $$CUSTOMER_OPTIONS
Restart=on-failure
RestartSec=60
StateDirectory=odmr
WorkingDirectory=%S/odmr
CapabilityBoundingSet=
NoNewPrivileges=yes
ProtectSystem=strict
$(hardening)

[Install]
WantedBy=multi-user.target
endef

define hardening
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
UMask=0077
endef

install: export provider_unit := $(provider_unit)
install: export customer_unit := $(customer_unit)

odmr: odmr.c odmr.h $(CHECKED)
	$(COMPILE) $(CPPFLAGS) $(HARDEN) -o $@ odmr.c $(HARDEN_LD) $(LDFLAGS) $(LIBS)

# One line that says what is missing, instead of a page of errors.
$(CHECKED):
	@mkdir -p build
	@cannot() { echo "odmr cannot be built: $$1" >&2; exit 1; }; \
	compiles() { printf '%b' "$$1" | $${2:-$(CC)} $(CPPFLAGS) -fsyntax-only -xc - 2> build/errors; }; \
	error() { sed -n '/error/{s/^[^:]*:[0-9:]* //p;q;}' build/errors; }; \
	ssl='#include <openssl/ssl.h>\n'; \
	command -v $(firstword $(CC)) > /dev/null || \
	  cannot 'there is no C compiler $(firstword $(CC)): apt-get install gcc libc6-dev'; \
	compiles '#include <stdio.h>\n' || \
	  cannot "$(CC) does not find the headers of the C library ($$(error)): apt-get install libc6-dev"; \
	compiles "$$ssl" || if compiles "$$ssl" cc; then compiles "$$ssl"; \
	    cannot "$(CC) does not find the headers of OpenSSL ($$(error)), though cc does: \
	it needs an OpenSSL for its own C library, named in CPPFLAGS and LDFLAGS"; \
	  else cannot "the headers of OpenSSL are missing ($$(error)): apt-get install libssl-dev"; fi; \
	compiles "$$ssl#if OPENSSL_VERSION_NUMBER < 0x30000000L\n#error old\n#endif\n" || \
	  cannot 'the headers of OpenSSL are older than version 3'
	@rm -f build/errors
	@touch $@

# The same program, watched by a sanitizer.
build/$(SANITIZE)/odmr: odmr.c odmr.h $(CHECKED)
	@mkdir -p build/$(SANITIZE)
	$(COMPILE) -O1 -fno-omit-frame-pointer -fsanitize=$(sanitizers) -fno-sanitize-recover=all -o $@ odmr.c $(LIBS)

# What the tests execute of odmr.c. The counters are mapped into a file, so those of a killed process count, too. Needs
# clang and llvm.
build/coverage/odmr: odmr.c odmr.h $(CHECKED)
	@mkdir -p build/coverage
	clang -std=gnu11 $(WARNINGS) -O1 -g -fprofile-instr-generate -fcoverage-mapping -mllvm -runtime-counter-relocation \
	  -o $@ odmr.c $(LIBS)

coverage: build/coverage/odmr build/proxy build/tls build/vectors build/fail.so build/stale.so
	rm -f build/coverage/*.profraw
	-LLVM_PROFILE_FILE='$(CURDIR)/build/coverage/%8m%c.profraw' ODMR=build/coverage/odmr ./test_odmr.sh $(TESTS)
	llvm-profdata merge -o build/coverage/all build/coverage/*.profraw
	llvm-cov show build/coverage/odmr -instr-profile=build/coverage/all odmr.c | grep -E '^ *[0-9]+\| *0\|' || true
	llvm-cov report -show-functions=0 build/coverage/odmr -instr-profile=build/coverage/all odmr.c

demo: odmr
	./odmr demo

# What the tests are made with.
build/proxy build/tls build/bench: build/%: .ci/%.c
	@mkdir -p build
	$(COMPILE) -o $@ $< $(LIBS)

build/crowd: .ci/crowd.c
	@mkdir -p build
	$(COMPILE) -o $@ $< -lcrypto

build/fail.so build/stale.so: build/%.so: .ci/%.c
	@mkdir -p build
	$(COMPILE) -fPIC -shared -o $@ $<

# odmr with the same in it, and watched: no leak, whatever fails.
FAILING = accept4 calloc connect fclose fdopen fdopendir fflush flock fstat fstatat fsync futimens fwrite malloc \
  mkdirat mkostemp openat poll posix_spawnp pread pthread_create pwrite readdir realloc recv renameat send socket \
  strdup unlinkat
build/failing: odmr.c odmr.h .ci/fail.c $(CHECKED)
	$(COMPILE) -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all -DWRAPPED \
	  $(FAILING:%=-Wl,--wrap=%) -o $@ odmr.c .ci/fail.c $(LIBS)

# In a minute and a half, or in TIME seconds; TESTS: these parts only; SEED: of the random moments.
torture: odmr build/proxy build/tls build/crowd build/fail.so build/failing
	./test_odmr.sh --torture $(TIME) $(TESTS)

build/vectors: .ci/vectors.c odmr.c odmr.h $(CHECKED)
	$(COMPILE) -o $@ $< $(LIBS)

ifdef SANITIZE
check: odmr build/$(SANITIZE)/odmr build/proxy build/tls build/vectors
	SANITIZED=1 ODMR=build/$(SANITIZE)/odmr ./test_odmr.sh $(TESTS)
else
check: odmr build/proxy build/tls build/vectors
	./test_odmr.sh $(TESTS)
endif

# odmr.c and a world in memory, with libFuzzer; each target is a name of the same program. The macros that stand in
# for calls leave parameters unused.
build/fuzz/odmr: .ci/fuzz.c .ci/fuzz.h odmr.c odmr.h $(CHECKED)
	@mkdir -p build/fuzz
	@sed "$$(sed -n 's/^#undef \(.*\)/s,^#define \1 .*,,/p' .ci/fuzz.h)" odmr.c \
	  > build/fuzz/odmr.c # its limits are fuzz.h's
	clang -std=gnu11 -I build/fuzz -I . $(WARNINGS) -Wno-shadow -Wno-unused-parameter -O2 -g \
	  -fno-omit-frame-pointer -fno-sanitize-recover=all -fsanitize=fuzzer,address,undefined \
	  -fno-sanitize-coverage=trace-cmp -o $@ .ci/fuzz.c $(LIBS)

fuzz: build/fuzz/odmr
	@TIME='$(TIME)' RUNS='$(RUNS)' .ci/fuzz $(TARGETS)

# The manual pages, from .ci/*.in and from --help of each command.
$(MANUALS): odmr .ci/man $(wildcard .ci/*.in)
	@mkdir -p $(@D)
	@.ci/man .ci/$(@F).in > $@.$$$$ && mv $@.$$$$ $@ || { rm -f $@.$$$$; exit 1; }

install: odmr $(MANUALS)
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(UNITS) $(DESTDIR)$(MAN)/man1 $(DESTDIR)$(MAN)/man5
	install -m 755 odmr $(DESTDIR)$(PREFIX)/bin/odmr
	umask 022; echo "$$provider_unit" > $(DESTDIR)$(UNITS)/odmr-provider.service
	umask 022; echo "$$customer_unit" > $(DESTDIR)$(UNITS)/odmr-customer.service
	install -m 644 $(filter %.1,$(MANUALS)) $(DESTDIR)$(MAN)/man1
	install -m 644 $(filter %.5,$(MANUALS)) $(DESTDIR)$(MAN)/man5

uninstall:
	rm -f $(DESTDIR)$(PREFIX)/bin/odmr $(MANUALS:build/man/%=$(DESTDIR)$(MAN)/%)
	rm -f $(DESTDIR)$(UNITS)/odmr-provider.service $(DESTDIR)$(UNITS)/odmr-customer.service

clean:
	rm -rf odmr build

# The protocol as a model: every run of it, and mutants of it. Needs spin.
model:
	@CC='$(CC)' .ci/model $(CHECKS)

# Ratios of times, each measured in one run; SCALE=N: the N-th part of all work; PARTS: of .ci/bench.
bench: odmr build/bench build/proxy
	.ci/bench '$(SCALE)' '$(PARTS)'

help:
	@sed -n '1,8s/^# //p' Makefile
