/* Preloaded into a refault: the name "far.test" is 127.0.0.1, and while the file $SLOW is there it takes the
   resolver five seconds to say so. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netdb.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints,
                struct addrinfo **found) {
    int (*real)(const char *, const char *, const struct addrinfo *, struct addrinfo **) =
        dlsym(RTLD_NEXT, "getaddrinfo");
    if (node == NULL || strcmp(node, "far.test") != 0)
        return real(node, service, hints, found);
    if (hints != NULL && hints->ai_flags & AI_NUMERICHOST)
        return EAI_NONAME;
    if (access(getenv("SLOW"), F_OK) == 0)
        sleep(5);
    return real("127.0.0.1", service, hints, found);
}
