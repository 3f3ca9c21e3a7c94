/* A service for the chaos run: says where it is and what each client has said, byte by byte, until that client has said
 * its last, then closes. A thread for each client, so that one who rests keeps nobody waiting.
 *
 *   echoer NAME             with a listener, or a socket for handed-off clients, as descriptor 3
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static char opening[600];

static int say(int client, const char *bytes, size_t left)
{
    while (left) {
        ssize_t said = send(client, bytes, left, MSG_NOSIGNAL);
        if (said < 0 && errno == EINTR)
            continue;
        if (said < 0)
            return -1;
        bytes += said;
        left -= said;
    }
    return 0;
}

static void *serve(void *given)
{
    int client = (int)(intptr_t)given;
    char bytes[16384];

    if (say(client, opening, strlen(opening)) == 0) {
        for (;;) {
            ssize_t heard = recv(client, bytes, sizeof bytes, 0);
            if (heard < 0 && errno == EINTR)
                continue;
            if (heard <= 0 || say(client, bytes, heard))
                break;
        }
    }
    close(client);
    return NULL;
}

/* A client that a broker has handed over: one datagram with one descriptor. */
static int handed(void)
{
    char note[560];
    union { char room[CMSG_SPACE(sizeof(int))]; struct cmsghdr aligned; } ancillary;
    struct iovec part = {note, sizeof note};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &ancillary, .msg_controllen = sizeof ancillary};
    int client = -1;

    if (recvmsg(3, &message, MSG_CMSG_CLOEXEC) < 0)
        return -1;
    struct cmsghdr *first = CMSG_FIRSTHDR(&message);
    if (first && first->cmsg_type == SCM_RIGHTS) {
        memcpy(&client, CMSG_DATA(first), sizeof client);
        /* Whether it blocks is not said (docs/handoff.md): it depends on the carrier. */
        fcntl(client, F_SETFL, 0);
    } else
        errno = EINTR;
    return client;
}

int main(int argc, char **argv)
{
    int kind = SOCK_STREAM;
    socklen_t size = sizeof kind;
    pthread_attr_t small;

    snprintf(opening, sizeof opening, "%s heard ", argc > 1 ? argv[1] : "echoer");
    getsockopt(3, SOL_SOCKET, SO_TYPE, &kind, &size);
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 65536);
    pthread_attr_setdetachstate(&small, PTHREAD_CREATE_DETACHED);
    for (;;) {
        pthread_t thread;
        int client = kind == SOCK_DGRAM ? handed() : accept(3, NULL, NULL);
        if (client < 0) {
            if (errno == EINTR || errno == ECONNABORTED)
                continue;
            perror("accept");
            return 1;
        }
        if (pthread_create(&thread, &small, serve, (void *)(intptr_t)client))
            close(client);
    }
}
