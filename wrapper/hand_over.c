#include "hand_over.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

static const char GREETING[] = "refault-exec 1";
enum {
    LOOK_AGAIN = 20,  /* milliseconds between two tries where refault's queue is full */
    KEPT_FROM = 200,  /* where libvirt's socket is kept: above the numbers that libvirt uses */
    QEMU_BACKLOG = 1, /* as QEMU itself has it (chardev/char-socket.c, qmp_chardev_open_socket_server) */
};

static long now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000 + time.tv_nsec / 1000000;
}

__attribute__((format(printf, 2, 3))) static int fail(char why[REFAULT_WHY_MAX], const char *format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(why, REFAULT_WHY_MAX, format, values);
    va_end(values);
    return -1;
}

static int is_listening_unix(int fd) {
    int family = 0, listens = 0;
    socklen_t size = sizeof(family);
    if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &family, &size) != 0 || family != AF_UNIX)
        return 0;
    size = sizeof(listens);
    return getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &size) == 0 && listens;
}

/* A full queue answers at once, and cannot be waited for. */
static int connect_until(const char *path, long deadline, char why[REFAULT_WHY_MAX]) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof(address.sun_path))
        return fail(why, "%s: too long", path);
    strcpy(address.sun_path, path);
    const int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return fail(why, "socket: %s", strerror(errno));
    while (connect(fd, (struct sockaddr *)&address, sizeof(address)) != 0) {
        const int error = errno;
        if (error == EINTR)
            continue;
        if (error != EAGAIN || now() >= deadline) {
            close(fd);
            return fail(why, "%s: %s", path, error == EAGAIN ? "it does not answer" : strerror(error));
        }
        poll(NULL, 0, LOOK_AGAIN);
    }
    return fd;
}

static int wait_until(int fd, short events, long deadline) {
    for (;;) {
        const long left = deadline - now();
        struct pollfd poll_fd = {.fd = fd, .events = events};
        const int ready = poll(&poll_fd, 1, left > 0 ? (int)left : 0);
        if (ready > 0)
            return 1;
        if (ready == 0 || errno != EINTR)
            return 0;
    }
}

static int append(char *packet, size_t size, size_t *length, const char *text) {
    const size_t more = strlen(text) + 1;
    if (*length + more > size)
        return 0;
    memcpy(packet + *length, text, more);
    *length += more;
    return 1;
}

/* One packet, with room for one descriptor beside it. */
struct packet {
    struct iovec data;
    struct msghdr message;
    union {
        char space[CMSG_SPACE(sizeof(int))];
        struct cmsghdr header;
    } control;
};

static void lay_out(struct packet *packet, char *bytes, size_t length) {
    *packet = (struct packet){.data = {.iov_base = bytes, .iov_len = length}};
    packet->message.msg_iov = &packet->data;
    packet->message.msg_iovlen = 1;
    packet->message.msg_control = packet->control.space;
    packet->message.msg_controllen = sizeof(packet->control.space);
}

static int send_until(int connection, const struct refault_arguments *arguments, long deadline) {
    char text[2048], number[16];
    size_t length = 0;
    struct packet packet;
    snprintf(number, sizeof(number), "%d", arguments->fd);
    if (!append(text, sizeof(text), &length, GREETING) ||
        !append(text, sizeof(text), &length, arguments->name) ||
        !append(text, sizeof(text), &length, arguments->uuid) || !append(text, sizeof(text), &length, number))
        return 0;
    lay_out(&packet, text, length);
    struct cmsghdr *rights = CMSG_FIRSTHDR(&packet.message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(rights), &arguments->fd, sizeof(int));
    for (;;) {
        if (sendmsg(connection, &packet.message, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0)
            return 1;
        if (errno == EINTR)
            continue;
        if (errno != EAGAIN || !wait_until(connection, POLLOUT, deadline))
            return 0;
    }
}

/* The socket that came, -1 and why where none did. Others that may have come are closed by the exec. */
static int receive_until(int connection, long deadline, char why[REFAULT_WHY_MAX]) {
    char answer[REFAULT_WHY_MAX];
    struct packet packet;
    ssize_t length;
    lay_out(&packet, answer, sizeof(answer) - 1);
    do {
        if (!wait_until(connection, POLLIN, deadline))
            return fail(why, "it does not answer");
        length = recvmsg(connection, &packet.message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    } while (length < 0 && (errno == EINTR || errno == EAGAIN));
    if (length <= 0)
        return fail(why, "%s", length == 0 ? "it went away" : strerror(errno));
    answer[length] = '\0';
    for (char *at = answer; at < answer + length; at++)
        if (*at < ' ' || *at > '~')
            *at = '?'; /* one line, whatever it says */
    int fd = -1;
    const struct cmsghdr *rights = CMSG_FIRSTHDR(&packet.message);
    if (rights != NULL && rights->cmsg_level == SOL_SOCKET && rights->cmsg_type == SCM_RIGHTS &&
        rights->cmsg_len >= CMSG_LEN(sizeof(int)))
        memcpy(&fd, CMSG_DATA(rights), sizeof(int));
    if (strcmp(answer, "ok") == 0 && fd >= 0)
        return fd;
    if (fd >= 0)
        close(fd);
    return fail(why, "%s", strncmp(answer, "no ", 3) == 0 ? answer + 3 : "its answer is not understood");
}

/* Puts fresh in the place of libvirt's socket, which stays open beside it. */
static int lay(int fresh, int place, char why[REFAULT_WHY_MAX]) {
    int type = 0;
    socklen_t size = sizeof(type);
    if (getsockopt(fresh, SOL_SOCKET, SO_TYPE, &type, &size) != 0 || type != SOCK_STREAM ||
        listen(fresh, QEMU_BACKLOG) != 0 || !is_listening_unix(fresh))
        return fail(why, "what it gives is no socket to listen at");
    int kept = fcntl(place, F_DUPFD, KEPT_FROM);
    if (kept < 0)
        kept = fcntl(place, F_DUPFD, 3);
    if (kept < 0)
        return fail(why, "no descriptor: %s", strerror(errno));
    if (dup2(fresh, place) < 0) {
        fail(why, "dup2: %s", strerror(errno));
        close(kept);
        return -1;
    }
    return 0;
}

int refault_hand_over(const char *socket_path, const struct refault_arguments *arguments, int milliseconds,
                      char why[REFAULT_WHY_MAX]) {
    const long deadline = now() + milliseconds;
    if (!is_listening_unix(arguments->fd))
        return fail(why, "descriptor %d is no unix socket that listens", arguments->fd);
    const int connection = connect_until(socket_path, deadline, why);
    if (connection < 0)
        return -1;
    if (!send_until(connection, arguments, deadline)) {
        fail(why, "it takes nothing");
        close(connection);
        return -1;
    }
    const int fresh = receive_until(connection, deadline, why);
    if (fresh < 0 || lay(fresh, arguments->fd, why) != 0) {
        if (fresh >= 0)
            close(fresh);
        close(connection);
        return -1;
    }
    return 0; /* both are close-on-exec: their end tells refault that this is QEMU now */
}
