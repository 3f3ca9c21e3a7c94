/* Clients and services around a broker, cheap enough that it is the broker that is measured.
 *
 * Decides what is said and how long it took; the same for every broker, which knows of none of this. Compiled when the
 * bench runs (`bench.traffic`). A client reports one line of JSON; a service says "ready" and works until it is killed.
 *
 *   traffic serve  WHERE stream|datagram WORK          WORK: one=LETTER, echo, sink=BYTES, source=BYTES
 *   traffic visit  ADDRESS PORT OPENINGS THREADS COUNT  connect, say an opening, read one byte and the end
 *   traffic ping   ADDRESS PORT OPENINGS CONNECTIONS ROUNDS   64 bytes there and back, on established connections
 *   traffic pace   ADDRESS PORT OPENINGS CONNECTIONS ROUNDS RATE   the same, so many rounds per second over all of them
 *   traffic hold   ADDRESS PORT OPENINGS CONNECTIONS    establish, say so, and echo on each again at each line of stdin
 *   traffic send   ADDRESS PORT OPENINGS CONNECTIONS BYTES    BYTES to a sink in all, until it says that it has them
 *   traffic take   ADDRESS PORT OPENINGS CONNECTIONS BYTES    BYTES from a source in all
 *
 * WHERE is unix:PATH or tcp:PORT (of 127.0.0.1). OPENINGS is a file of first words, each behind its length in two bytes,
 * big-endian; they are said in turn, and by a connection that stays the first alone.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define PIECE (128 << 10)
#define ROUND_BYTES 64
#define PATIENCE_S 30
#define SERVICE_THREADS 2

static void fail(const char *what) {
    fprintf(stderr, "traffic: %s: %s\n", what, errno ? strerror(errno) : "wrong answer");
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void start_thread(void *(*run)(void *), void *with) {
    pthread_t thread;
    if ((errno = pthread_create(&thread, NULL, run, with)) != 0) fail("pthread_create");
    pthread_detach(thread);
}

static void no_delay(int socket) {
    int on = 1;
    setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

/* All of it, waiting where the socket is full; 0 if the peer is gone. */
static int say(int socket, const char *bytes, size_t length) {
    while (length > 0) {
        ssize_t count = send(socket, bytes, length, MSG_NOSIGNAL);
        if (count < 0 && errno == EAGAIN) {
            struct pollfd room = {.fd = socket, .events = POLLOUT};
            poll(&room, 1, PATIENCE_S * 1000);
        } else if (count <= 0) {
            return 0;
        } else {
            bytes += count;
            length -= (size_t)count;
        }
    }
    return 1;
}

/* ---- services ----------------------------------------------------------------------------------------------------- */

enum work { ONE, ECHO, SINK, SOURCE };
static enum work work;
static uint64_t bulk_bytes;
static char letter;
static int listener;

/* One piece of work on a client that has said something; 0 when it is over. */
static int answer(int client) {
    char bytes[4096];
    ssize_t count = recv(client, bytes, sizeof bytes, MSG_DONTWAIT);
    if (count < 0 && errno == EAGAIN) return 1;
    if (count <= 0) return 0;
    if (work == ECHO) return say(client, bytes, (size_t)count);
    say(client, &letter, 1);
    return 0;
}

/* Bulk, a thread each: a sink says that it has them when it has so many, the opening included (not every broker carries a
 * FIN in one direction alone); a source says so many after the opening. */
static void *pour(void *with) {
    int client = (int)(intptr_t)with;
    char *piece = calloc(1, PIECE);
    ssize_t count = recv(client, piece, PIECE, 0);
    if (work == SINK) {
        uint64_t heard = 0;
        while (count > 0 && (heard += (uint64_t)count) < bulk_bytes) count = recv(client, piece, PIECE, 0);
        if (heard == bulk_bytes) say(client, "x", 1);
    }
    for (uint64_t left = work == SOURCE ? bulk_bytes : 0; left > 0 && count > 0;) {
        size_t length = left < PIECE ? (size_t)left : PIECE;
        if (!say(client, piece, length)) break;
        left -= length;
    }
    close(client);
    free(piece);
    return NULL;
}

static void *serve_stream(void *unused) {
    (void)unused;
    int poller = epoll_create1(0);
    struct epoll_event wanted = {.events = EPOLLIN | EPOLLEXCLUSIVE, .data.fd = listener}, ready[64];
    if (epoll_ctl(poller, EPOLL_CTL_ADD, listener, &wanted) < 0) fail("epoll_ctl");
    for (;;) {
        int count = epoll_wait(poller, ready, 64, -1);
        for (int place = 0; place < count; place++) {
            if (ready[place].data.fd != listener) {
                if (!answer(ready[place].data.fd)) close(ready[place].data.fd);
                continue;
            }
            int client = accept4(listener, NULL, NULL, work < SINK ? SOCK_NONBLOCK : 0);
            if (client < 0) continue;
            no_delay(client);
            if (work >= SINK) {
                start_thread(pour, (void *)(intptr_t)client);
                continue;
            }
            /* What is there already is answered at once; only who waits costs a place in the poller. */
            if (!answer(client)) {
                close(client);
                continue;
            }
            struct epoll_event reading = {.events = EPOLLIN, .data.fd = client};
            if (epoll_ctl(poller, EPOLL_CTL_ADD, client, &reading) < 0) fail("epoll_ctl");
        }
    }
    return NULL;
}

/* docs/handoff.md: a note and a socket in one datagram. All that the client has said waits in its socket. */
static void *serve_datagrams(void *unused) {
    (void)unused;
    for (;;) {
        char note[560], control[CMSG_SPACE(4 * sizeof(int))];
        struct iovec into = {.iov_base = note, .iov_len = sizeof note};
        struct msghdr message = {
            .msg_iov = &into, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
        if (recvmsg(listener, &message, MSG_CMSG_CLOEXEC) < 0) fail("recvmsg");
        struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
        if (rights == NULL || rights->cmsg_type != SCM_RIGHTS) continue;
        int client;
        memcpy(&client, CMSG_DATA(rights), sizeof client);
        answer(client);
        close(client);
    }
    return NULL;
}

static _Noreturn void serve(char **words) {
    int is_unix = strncmp(words[0], "unix:", 5) == 0, by_datagrams = strcmp(words[1], "datagram") == 0;
    work = strncmp(words[2], "one=", 4) == 0 ? ONE : strcmp(words[2], "echo") == 0 ? ECHO
         : strncmp(words[2], "sink=", 5) == 0 ? SINK : SOURCE;
    if (work == ONE) letter = words[2][4];
    if (work >= SINK) bulk_bytes = strtoull(strchr(words[2], '=') + 1, NULL, 10);
    union { struct sockaddr any; struct sockaddr_un path; struct sockaddr_in port; } at = {0};
    socklen_t length = is_unix ? sizeof at.path : sizeof at.port;
    if (is_unix) {
        at.path.sun_family = AF_UNIX;
        strncpy(at.path.sun_path, words[0] + 5, sizeof at.path.sun_path - 1);
    } else {
        at.port = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(words[0] + 4)),
                                       .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    }
    int kind = by_datagrams ? SOCK_DGRAM : SOCK_STREAM | SOCK_NONBLOCK, on = 1;
    listener = socket(is_unix ? AF_UNIX : AF_INET, kind, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, &at.any, length) < 0) fail("bind");
    if (!by_datagrams && listen(listener, 4096) < 0) fail("listen");
    for (int thread = 0; thread < SERVICE_THREADS; thread++)
        start_thread(by_datagrams ? serve_datagrams : serve_stream, NULL);
    printf("ready\n");
    fflush(stdout);
    for (;;) pause();
}

/* ---- clients ------------------------------------------------------------------------------------------------------ */

static struct sockaddr_in broker = {.sin_family = AF_INET};
static char *openings;
static size_t openings_bytes;
static size_t *opening_at;
static uint64_t opening_count;

static const char *opening(uint64_t number, size_t *length) {
    const unsigned char *at = (unsigned char *)openings + opening_at[number % opening_count];
    *length = (size_t)at[0] << 8 | at[1];
    return (const char *)at + 2;
}

static void read_openings(const char *path) {
    FILE *file = fopen(path, "rb");
    if (file == NULL) fail(path);
    fseek(file, 0, SEEK_END);
    openings_bytes = (size_t)ftell(file);
    rewind(file);
    openings = malloc(openings_bytes);
    opening_at = malloc(openings_bytes / 3 * sizeof *opening_at);
    if (fread(openings, 1, openings_bytes, file) != openings_bytes) fail(path);
    fclose(file);
    for (size_t at = 0; at < openings_bytes;) {
        size_t length;
        opening_at[opening_count++] = at;
        opening(opening_count - 1, &length);
        at += 2 + length;
    }
}

/* Each thread has an address of its own, and so a range of ports of its own. */
static int connected(int thread) {
    int client = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    struct sockaddr_in from = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK + 1 + (uint32_t)thread)};
    struct timeval patience = {.tv_sec = PATIENCE_S};
    if (client < 0) fail("socket");
    setsockopt(client, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
    setsockopt(client, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (bind(client, (struct sockaddr *)&from, sizeof from) < 0) fail("bind");
    if (connect(client, (struct sockaddr *)&broker, sizeof broker) < 0) fail("connect");
    return client;
}

struct visitor {
    int thread;
    uint64_t first, count;
    uint32_t *took_ns;
    pthread_t running;
};

static void *visit(void *with) {
    struct visitor *visitor = with;
    for (uint64_t number = 0; number < visitor->count; number++) {
        size_t length;
        const char *words = opening(visitor->first + number, &length);
        char bytes[64];
        uint64_t started_ns = now_ns();
        int client = connected(visitor->thread);
        if (!say(client, words, length)) fail("send");
        errno = 0;
        if (recv(client, bytes, sizeof bytes, 0) != 1) fail("the service's answer");
        visitor->took_ns[number] = (uint32_t)(now_ns() - started_ns);
        if (recv(client, bytes, sizeof bytes, 0) != 0) fail("the service's end");
        close(client);
    }
    return NULL;
}

static int by_size(const void *one, const void *other) {
    uint32_t left = *(const uint32_t *)one, right = *(const uint32_t *)other;
    return left < right ? -1 : left > right;
}

static void report(uint32_t *took_ns, uint64_t count, uint64_t taken_ns) {
    qsort(took_ns, count, sizeof *took_ns, by_size);
    printf("{\"seconds\": %.9f, \"count\": %llu, \"p50_us\": %.3f, \"p99_us\": %.3f}\n", (double)taken_ns / 1e9,
           (unsigned long long)count, took_ns[count / 2] / 1e3, took_ns[count * 99 / 100] / 1e3);
    fflush(stdout);
}

static int visits(int threads, uint64_t count) {
    struct visitor visitors[64];
    if (threads < 1 || threads > 64 || count < 1) fail("threads");
    uint32_t *took_ns = malloc(count * sizeof *took_ns);
    uint64_t started_ns = now_ns(), first = 0;
    for (int thread = 0; thread < threads; thread++) {
        uint64_t share = count / (uint64_t)threads + ((uint64_t)thread < count % (uint64_t)threads);
        visitors[thread] = (struct visitor){.thread = thread, .first = first, .count = share, .took_ns = took_ns + first};
        first += share;
        if ((errno = pthread_create(&visitors[thread].running, NULL, visit, &visitors[thread]))) fail("pthread_create");
    }
    for (int thread = 0; thread < threads; thread++) pthread_join(visitors[thread].running, NULL);
    report(took_ns, count, now_ns() - started_ns);
    return 0;
}

/* Read exactly so many bytes. */
static void hear(int client, char *into, size_t length) {
    for (size_t heard = 0; heard < length;) {
        errno = 0;
        ssize_t count = recv(client, into + heard, length - heard, 0);
        if (count <= 0) fail("the echo");
        heard += (size_t)count;
    }
}

/* A connection to an echo that has said its opening and heard it back. */
static int established(int thread) {
    char back[UINT16_MAX];
    size_t length;
    const char *words = opening(0, &length);
    int client = connected(thread);
    no_delay(client);
    if (!say(client, words, length)) fail("send");
    hear(client, back, length);
    if (memcmp(words, back, length) != 0) fail("the echo of the opening");
    return client;
}

static void fill(char *token, uint64_t number) {
    for (int place = 0; place < ROUND_BYTES; place++) token[place] = (char)(number * 31 + (uint64_t)place * 7);
}

static int ping(int connections, uint64_t rounds) {
    int poller = epoll_create1(0), *clients = calloc((size_t)connections, sizeof *clients);
    uint64_t *sent_ns = calloc((size_t)connections, sizeof *sent_ns), begun = 0, over = 0;
    uint32_t *took_ns = malloc(rounds * sizeof *took_ns);
    char token[ROUND_BYTES], back[ROUND_BYTES];
    struct epoll_event ready[64];
    for (int place = 0; place < connections; place++) {
        clients[place] = established(place % 8);
        struct epoll_event wanted = {.events = EPOLLIN, .data.u32 = (uint32_t)place};
        if (epoll_ctl(poller, EPOLL_CTL_ADD, clients[place], &wanted) < 0) fail("epoll_ctl");
    }
    uint64_t started_ns = now_ns();
    for (int place = 0; place < connections && begun < rounds; place++, begun++) {
        fill(token, (uint64_t)place);
        sent_ns[place] = now_ns();
        if (!say(clients[place], token, sizeof token)) fail("send");
    }
    while (over < rounds) {
        int count = epoll_wait(poller, ready, 64, PATIENCE_S * 1000);
        errno = 0;
        if (count <= 0) fail("an echo in time");
        for (int number = 0; number < count && over < rounds; number++) {
            uint32_t place = ready[number].data.u32;
            hear(clients[place], back, sizeof back);
            uint64_t heard_ns = now_ns();
            fill(token, place);
            if (memcmp(token, back, sizeof back) != 0) fail("the echo of a round");
            took_ns[over++] = (uint32_t)(heard_ns - sent_ns[place]);
            if (begun < rounds) {
                begun++;
                sent_ns[place] = now_ns();
                if (!say(clients[place], token, sizeof token)) fail("send");
            }
        }
    }
    report(took_ns, rounds, now_ns() - started_ns);
    return 0;
}

/* Rounds that are under way on one connection, by when they were due: an echo is in order. */
#define UNDER_WAY 4096
struct lane {
    int client;
    uint32_t said, heard;
    uint64_t due_ns[UNDER_WAY];
};

/* At a rate that leaves processors idle. A round counts from when it was due, whatever was late: else who is slow would be
 * asked less (coordinated omission). */
static int pace(int connections, uint64_t rounds, uint64_t rate) {
    int poller = epoll_create1(0);
    struct lane *lanes = calloc((size_t)connections, sizeof *lanes);
    uint32_t *took_ns = malloc(rounds * sizeof *took_ns);
    uint64_t begun = 0, over = 0;
    char token[ROUND_BYTES], back[ROUND_BYTES];
    struct epoll_event ready[64];
    if (rate < 1) fail("the rate");
    prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0);
    for (int place = 0; place < connections; place++) {
        lanes[place].client = established(place % 8);
        struct epoll_event wanted = {.events = EPOLLIN, .data.u32 = (uint32_t)place};
        if (epoll_ctl(poller, EPOLL_CTL_ADD, lanes[place].client, &wanted) < 0) fail("epoll_ctl");
    }
    uint64_t started_ns = now_ns();
    while (over < rounds) {
        uint64_t now = now_ns(), due_ns = 0;
        for (; begun < rounds; begun++) {
            due_ns = started_ns + begun * 1000000000u / rate;
            if (due_ns > now) break;
            struct lane *lane = &lanes[begun % (uint64_t)connections];
            if (lane->said - lane->heard == UNDER_WAY) fail("rounds under way");
            lane->due_ns[lane->said++ % UNDER_WAY] = due_ns;
            fill(token, begun % (uint64_t)connections);
            if (!say(lane->client, token, sizeof token)) fail("send");
        }
        uint64_t nap_ns = begun < rounds ? due_ns - now : (uint64_t)PATIENCE_S * 1000000000u;
        struct timespec nap = {.tv_sec = (time_t)(nap_ns / 1000000000u), .tv_nsec = (long)(nap_ns % 1000000000u)};
        int count = epoll_pwait2(poller, ready, 64, &nap, NULL);
        if (count < 0 || (count == 0 && begun == rounds)) fail("an echo in time");
        for (int number = 0; number < count && over < rounds; number++) {
            struct lane *lane = &lanes[ready[number].data.u32];
            hear(lane->client, back, sizeof back);
            uint64_t heard_ns = now_ns();
            fill(token, ready[number].data.u32);
            if (memcmp(token, back, sizeof back) != 0) fail("the echo of a round");
            took_ns[over++] = (uint32_t)(heard_ns - lane->due_ns[lane->heard++ % UNDER_WAY]);
        }
    }
    report(took_ns, rounds, now_ns() - started_ns);
    return 0;
}

static int hold(int connections) {
    int *clients = calloc((size_t)connections, sizeof *clients);
    char token[ROUND_BYTES], back[ROUND_BYTES], line[16];
    for (int place = 0; place < connections; place++) clients[place] = established(place % 8);
    do {
        printf("{\"held\": %d}\n", connections);
        fflush(stdout);
        if (fgets(line, sizeof line, stdin) == NULL) break;
        for (int place = 0; place < connections; place++) {
            fill(token, (uint64_t)place);
            if (!say(clients[place], token, sizeof token)) fail("send");
            hear(clients[place], back, sizeof back);
            if (memcmp(token, back, sizeof back) != 0) fail("the echo after the rest");
        }
    } while (1);
    return 0;
}

static int is_sending;
static pthread_barrier_t all_there;

struct carrier {
    int thread;
    uint64_t bytes;
    pthread_t running;
};

static void *carry(void *with) {
    struct carrier *carrier = with;
    char *piece = calloc(1, PIECE);
    size_t length;
    const char *words = opening(0, &length);
    int client = connected(carrier->thread);
    pthread_barrier_wait(&all_there);
    if (!say(client, words, length)) fail("send");
    uint64_t left = carrier->bytes;
    while (is_sending && left > 0) {
        size_t part = left < PIECE ? (size_t)left : PIECE;
        if (!say(client, piece, part)) fail("send");
        left -= part;
    }
    errno = 0;
    if (is_sending) {
        if (recv(client, piece, 1, 0) != 1) fail("the sink's word");
    } else {
        for (ssize_t count; (count = recv(client, piece, PIECE, 0)) > 0;) left -= (uint64_t)count;
        if (left != 0) fail("the source's bytes");
    }
    close(client);
    return NULL;
}

static int bulk(int connections, uint64_t bytes) {
    struct carrier carriers[64];
    if (connections < 1 || connections > 64) fail("connections");
    pthread_barrier_init(&all_there, NULL, (unsigned)connections + 1);
    for (int place = 0; place < connections; place++) {
        carriers[place] = (struct carrier){.thread = place, .bytes = bytes / (uint64_t)connections};
        if ((errno = pthread_create(&carriers[place].running, NULL, carry, &carriers[place]))) fail("pthread_create");
    }
    pthread_barrier_wait(&all_there);
    uint64_t started_ns = now_ns();
    for (int place = 0; place < connections; place++) pthread_join(carriers[place].running, NULL);
    printf("{\"seconds\": %.9f, \"bytes\": %llu}\n", (double)(now_ns() - started_ns) / 1e9,
           (unsigned long long)(bytes / (uint64_t)connections * (uint64_t)connections));
    return 0;
}

int main(int count, char **words) {
    struct rlimit descriptors;
    getrlimit(RLIMIT_NOFILE, &descriptors);
    descriptors.rlim_cur = descriptors.rlim_max;
    setrlimit(RLIMIT_NOFILE, &descriptors);
    const char *role = count > 1 ? words[1] : "";
    if (strcmp(role, "serve") == 0 && count == 5) serve(words + 2);
    if (count < 6) {
        fprintf(stderr, "traffic: see its first lines\n");
        return 2;
    }
    if (inet_pton(AF_INET, words[2], &broker.sin_addr) != 1) fail("the address");
    broker.sin_port = htons((uint16_t)atoi(words[3]));
    read_openings(words[4]);
    int connections = atoi(words[5]);
    uint64_t most = count > 6 ? strtoull(words[6], NULL, 10) : 0;
    is_sending = strcmp(role, "send") == 0;
    if (strcmp(role, "visit") == 0) return visits(connections, most);
    if (strcmp(role, "ping") == 0) return ping(connections, most);
    if (strcmp(role, "pace") == 0) return pace(connections, most, count > 7 ? strtoull(words[7], NULL, 10) : 0);
    if (strcmp(role, "hold") == 0) return hold(connections);
    return bulk(connections, most);
}
