/* A thread is cancelled inside connect(): its cleanup has to run, through whatever frames lie between. */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

static int in_connect[2];

static void clean(void *nothing) { puts("cleaned up"); }

static void *wait_for_nobody(void *address) {
    int one = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(7001)};
    inet_pton(AF_INET, address, &to.sin_addr);
    pthread_cleanup_push(clean, NULL);
    write(in_connect[1], "", 1);
    connect(one, (struct sockaddr *)&to, sizeof to);
    perror("connect came back");
    pthread_cleanup_pop(0);
    return NULL;
}

int main(int count, char **words) {
    pthread_t thread;
    void *result;
    char byte;
    pipe(in_connect);
    pthread_create(&thread, NULL, wait_for_nobody, words[1]);
    read(in_connect[0], &byte, 1);
    usleep(200000); /* cancelled before or in connect(): both are to end well, the second is what is meant */
    pthread_cancel(thread);
    pthread_join(thread, &result);
    puts(result == PTHREAD_CANCELED ? "cancelled" : "not cancelled");
    return 0;
}
