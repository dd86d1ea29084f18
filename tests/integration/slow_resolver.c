/* Preloaded into a refault: the name "far.test" is 127.0.0.1, and the resolver does not say so while the file $HELD
   is there, and then takes five seconds where the file $SLOW is. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netdb.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int is_there(const char *file) {
    return file != NULL && access(file, F_OK) == 0;
}

int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints,
                struct addrinfo **found) {
    int (*real)(const char *, const char *, const struct addrinfo *, struct addrinfo **) =
        dlsym(RTLD_NEXT, "getaddrinfo");
    if (node == NULL || strcmp(node, "far.test") != 0)
        return real(node, service, hints, found);
    if (hints != NULL && hints->ai_flags & AI_NUMERICHOST)
        return EAI_NONAME;
    while (is_there(getenv("HELD")))
        usleep(10000);
    if (is_there(getenv("SLOW")))
        sleep(5);
    return real("127.0.0.1", service, hints, found);
}
