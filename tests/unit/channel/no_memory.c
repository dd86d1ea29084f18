/* Preloaded: every other poll(2) and every third sendmsg(2) outside the main thread fails for want of memory,
 * and so does what asks for as much at once as a lane takes. What the main thread frees of the size of a
 * chunk of records (records.c) is counted. */
#include <errno.h>
#include <malloc.h>
#include <poll.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { CHUNK_AT_LEAST = 15 * 1024, CHUNK_AT_MOST = 16 * 1024 };
enum { LANE_AT_LEAST = 64 * 1024, LANE_AT_MOST = 80 * 1024 };

void *__libc_calloc(size_t count, size_t size);
void __libc_free(void *memory);

static unsigned chunks_freed;

unsigned chunks_freed_by_main(void) { return chunks_freed; }

void free(void *memory) {
    if (memory != NULL && gettid() == getpid()) {
        size_t size = malloc_usable_size(memory);

        chunks_freed += size >= CHUNK_AT_LEAST && size <= CHUNK_AT_MOST;
    }
    __libc_free(memory);
}

int poll(struct pollfd *polls, nfds_t count, int timeout) {
    static atomic_uint calls;

    if (gettid() != getpid() && timeout != 0 && atomic_fetch_add(&calls, 1) % 2 == 0) {
        errno = ENOMEM;
        return -1;
    }
    return (int)syscall(SYS_poll, polls, count, timeout);
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags) {
    static atomic_uint calls;

    if (gettid() != getpid() && atomic_fetch_add(&calls, 1) % 3 == 0) {
        errno = ENOBUFS; /* net/core/sock.c, sock_alloc_send_pskb */
        return -1;
    }
    return syscall(SYS_sendmsg, fd, message, flags);
}

void *calloc(size_t count, size_t size) {
    if (count == 1 && size >= LANE_AT_LEAST && size <= LANE_AT_MOST) {
        errno = ENOMEM;
        return NULL;
    }
    return __libc_calloc(count, size);
}
