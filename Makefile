# make            ./odmr                      make demo       a whole session on this machine
# make check      the tests                   make install    PREFIX=/usr/local DESTDIR=
# make check SANITIZE=address|thread          make uninstall, make clean, make help

CC       = cc
PREFIX   = /usr/local
CFLAGS   = -O2 -g
WARNINGS = -Wall -Wextra -Wshadow -Wstrict-prototypes -Wpointer-arith -Wvla -Wformat=2
HARDEN   = -fstack-protector-strong -D_FORTIFY_SOURCE=2 -fPIE
HARDEN_LD = -pie -Wl,-z,relro,-z,now
LIBS     = -lssl -lcrypto -pthread
COMPILE  = $(CC) -std=gnu11 $(WARNINGS) $(CFLAGS)
sanitizers = $(if $(filter address,$(SANITIZE)),address$(comma)undefined,$(SANITIZE))
comma    := ,

.DELETE_ON_ERROR:
.PHONY: all demo check install uninstall clean help

all: odmr

odmr: odmr.c odmr.h build/openssl
	$(COMPILE) $(HARDEN) $(CPPFLAGS) -o $@ odmr.c $(HARDEN_LD) $(LDFLAGS) $(LIBS)

# One line instead of a page of errors when OpenSSL's headers are missing or too old.
build/openssl:
	@mkdir -p build
	@printf '#include <openssl/ssl.h>\n#if OPENSSL_VERSION_NUMBER < 0x30000000L\n#error old\n#endif\n' | \
	  $(CC) $(CPPFLAGS) -fsyntax-only -xc - 2>/dev/null || \
	  { echo 'odmr needs a C compiler and the headers of OpenSSL 3: apt-get install gcc libssl-dev' >&2; exit 1; }
	@touch $@

# The same program, watched by a sanitizer.
build/$(SANITIZE)/odmr: odmr.c odmr.h build/openssl
	@mkdir -p build/$(SANITIZE)
	$(COMPILE) -O1 -fno-omit-frame-pointer -fsanitize=$(sanitizers) -fno-sanitize-recover=all -o $@ odmr.c $(LIBS)

demo: odmr
	./odmr demo

# What the tests are made with.
build/proxy: .ci/proxy.c
	@mkdir -p build
	$(COMPILE) -o $@ $<

ifdef SANITIZE
check: odmr build/$(SANITIZE)/odmr build/proxy
	SANITIZED=1 ODMR=build/$(SANITIZE)/odmr ./test_odmr.sh $(TESTS)
else
check: odmr build/proxy
	./test_odmr.sh $(TESTS)
endif

install: odmr
	install -d $(DESTDIR)$(PREFIX)/bin
	install -m 755 odmr $(DESTDIR)$(PREFIX)/bin/odmr

uninstall:
	rm -f $(DESTDIR)$(PREFIX)/bin/odmr

clean:
	rm -rf odmr build

help:
	@sed -n '1,3s/^# //p' Makefile
