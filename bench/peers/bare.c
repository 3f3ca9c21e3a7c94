/* The system calls of a handoff, and nothing else: accept, look, give away, close.
 *
 * Decides nothing: every connection goes to one service. What it costs is what no broker that hands sockets over can be
 * below, for each has to make these calls: it sniffs nothing, looks up nothing, counts nothing, bounds nothing and logs
 * nothing. Compiled when the bench runs (`bench.brokers`).
 *
 *   bare PORT PATH   from 127.0.0.1:PORT to the unix datagram socket at PATH, in one thread
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { AT_ONCE = 4096, NOTE_BYTES = 82 };

/* A note of docs/handoff.md, without the client's address: it is as long, and the service of the bench reads none. */
static char note[NOTE_BYTES] = {'4', 'T', 'U', 'P', 1, 0, 0, NOTE_BYTES};
static int poller, listener, sender;
/* For whom there was no room at the service, in their order. */
static int waiting[AT_ONCE], waiters;

static void must(int outcome, const char *what) {
    if (outcome < 0) {
        perror(what);
        exit(1);
    }
}

static void watch(int descriptor, uint32_t events) {
    struct epoll_event event = {.events = events | EPOLLET, .data.fd = descriptor};
    must(epoll_ctl(poller, EPOLL_CTL_ADD, descriptor, &event), "epoll_ctl");
}

/* Whether it is given away. */
static int give(int client) {
    struct iovec bytes = {note, sizeof note};
    union {
        char room[CMSG_SPACE(sizeof(int))];
        struct cmsghdr aligned;
    } control = {0};
    struct msghdr message = {
        .msg_iov = &bytes, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = CMSG_SPACE(sizeof(int))};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(header), &client, sizeof client);
    if (sendmsg(sender, &message, MSG_DONTWAIT | MSG_NOSIGNAL) < 0) {
        if (errno != EAGAIN) must(-1, "sendmsg");
        return 0;
    }
    close(client);
    return 1;
}

static void look(int client, int is_new) {
    char peek[2048];
    ssize_t seen = recv(client, peek, sizeof peek, MSG_PEEK | MSG_DONTWAIT);
    if (seen < 0 && errno == EAGAIN) {
        if (is_new) watch(client, EPOLLIN);
    } else if (seen <= 0) {
        close(client);
    } else if (!give(client)) {
        if (waiters == AT_ONCE) must(-1, "too many clients wait");
        waiting[waiters++] = client;
    }
}

static void retry(void) {
    int given = 0;
    while (given < waiters && give(waiting[given])) given++;
    waiters -= given;
    memmove(waiting, waiting + given, (size_t)waiters * sizeof *waiting);
}

int main(int count, char **words) {
    struct sockaddr_un service = {.sun_family = AF_UNIX};
    if (count != 3 || strlen(words[2]) >= sizeof service.sun_path) return 64;
    struct sockaddr_in here = {
        .sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(words[1])), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    strcpy(service.sun_path, words[2]);
    int one = 1;
    must(poller = epoll_create1(0), "epoll_create1");
    must(sender = socket(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK, 0), "socket");
    must(connect(sender, (struct sockaddr *)&service, sizeof service), "connect");
    must(listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), "socket");
    must(setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one), "SO_REUSEADDR");
    must(bind(listener, (struct sockaddr *)&here, sizeof here), "bind");
    must(listen(listener, AT_ONCE), "listen");
    watch(sender, EPOLLOUT);
    watch(listener, EPOLLIN);
    for (;;) {
        struct epoll_event events[256];
        int happened = epoll_wait(poller, events, 256, -1);
        for (int at = 0; at < happened; at++) {
            int descriptor = events[at].data.fd;
            if (descriptor == sender) {
                retry();
            } else if (descriptor == listener) {
                struct sockaddr_in peer;
                socklen_t length = sizeof peer;
                for (int client; (client = accept4(listener, (struct sockaddr *)&peer, &length, SOCK_NONBLOCK)) >= 0;)
                    look(client, 1);
            } else {
                look(descriptor, 0);
            }
        }
    }
}
