/* A service that makes its own listening socket: answers each connection with its name and what it has heard.
 *
 *   owner PATH NAME
 */
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    char bytes[4096];
    struct sockaddr_un at = {.sun_family = AF_UNIX};
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);

    if (argc != 3 || strlen(argv[1]) >= sizeof at.sun_path)
        return 64;
    strcpy(at.sun_path, argv[1]);
    if (bind(listener, (struct sockaddr *)&at, sizeof at) || listen(listener, 4096)) {
        perror(argv[1]);
        return 1;
    }
    int said = snprintf(bytes, 512, "%s heard ", argv[2]);
    for (;;) {
        int client = accept(listener, NULL, NULL);
        ssize_t heard = read(client, bytes + said, sizeof bytes - said);
        if (heard > 0 && write(client, bytes, said + heard) < 0)
            perror("write");
        close(client);
    }
}
