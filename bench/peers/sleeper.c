/* A service that sleeps until it is called, as small as one can be: it is passed its listening socket (LISTEN_FDS),
 * answers each connection with its name and what it has heard, and closes it.
 *
 *   sleeper NAME            with a listener as descriptor 3
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    char bytes[4096];
    const char *name = argc > 1 ? argv[1] : "sleeper";
    int said = snprintf(bytes, 512, "%s heard ", name);

    for (;;) {
        int client = accept(3, NULL, NULL);
        if (client < 0) {
            if (errno == EINTR || errno == ECONNABORTED)
                continue;
            perror("accept");
            return 1;
        }
        ssize_t heard = read(client, bytes + said, sizeof bytes - said);
        if (heard > 0 && write(client, bytes, said + heard) < 0)
            perror("write");
        close(client);
    }
}
