/* RFC 7677, section 3: its example exchange, taken by both halves of odmr.c as they stand there. Each message but
 * the other side's is made or checked by the functions of a session; only the nonces are given, not drawn. */

#define main odmr_main
#include "../odmr.c"
#undef main

#define CLIENT_NONCE "rOprNGfwEbeRWgbNEkqO"
#define NONCE CLIENT_NONCE "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
#define BARE "n=user,r=" CLIENT_NONCE
#define SERVER_FIRST "r=" NONCE ",s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
#define CLIENT_FINAL "c=biws,r=" NONCE ",p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
#define SERVER_FINAL "v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="
#define SECRET "pencil"

static int failures;

static void check(bool right, const char *what)
{
    printf("%s %s\n", right ? "ok" : "FAILED", what);
    failures += !right;
}

static void customer_half(void)
{
    struct customer c = {.user = "user", .secret = SECRET};
    struct scram_exchange x = {.header = "n,,", .bare = BARE, .nonce = CLIENT_NONCE};
    struct verifier v;
    char final[CHALLENGE_MAX] = "", servers[64] = "";
    check(take_server_first(&x, SERVER_FIRST, &v), "the customer takes the challenge");
    check(make_client_final(&c, &x, &v, final, sizeof final) && strcmp(final, CLIENT_FINAL) == 0,
          "the customer's last message");
    check(server_final(&x, &v, servers) && strcmp(servers, SERVER_FINAL) == 0,
          "the customer knows the provider by its signature");
}

static void hear(struct session *s, const char *message)
{
    s->response_len = snprintf(s->response, sizeof s->response, "%s", message);
}

static void provider_half(void)
{
    static struct session s;
    struct scram_exchange x = {.plus = false};
    struct verifier v = {.iterations = 4096, .salt_len = 16};
    char final[64], salt[SALT_MAX + 4] = "";
    bool right;
    hear(&s, "n,," BARE);
    check(take_client_first(&s, &x) && strcmp(x.name, "user") == 0 && strcmp(x.nonce, CLIENT_NONCE) == 0,
          "the provider takes the first message");
    snprintf(x.nonce, sizeof x.nonce, "%s", NONCE);
    snprintf(x.server_first, sizeof x.server_first, "%s", SERVER_FIRST);
    check(base64_decode(salt, sizeof salt, "W22ZaJ0SNY7soEsUEjb6gQ==") == 16, "the salt");
    memcpy(v.salt, salt, v.salt_len);
    check(scram_keys(&v.keys, SECRET, v.salt, v.salt_len, v.iterations), "the keys");
    OPENSSL_cleanse(v.keys.client, sizeof v.keys.client); /* a server has no ClientKey */
    hear(&s, CLIENT_FINAL);
    check(take_client_final(&s, &x, &v, &right) && right, "the provider takes the proof");
    check(server_final(&x, &v, final), "the provider signs");
    check(strcmp(final, SERVER_FINAL) == 0, "the provider's signature");
}

int main(void)
{
    customer_half();
    provider_half();
    return failures ? 1 : 0;
}
