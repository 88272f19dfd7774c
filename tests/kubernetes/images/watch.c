// Prints the name of each file that is moved into the folder of its argument, as inotify(7) reports it.
#include <stdio.h>
#include <sys/inotify.h>
#include <unistd.h>

int main(int count, char **arguments) {
    char events[4096] __attribute__((aligned(__alignof__(struct inotify_event))));
    int watch = inotify_init1(IN_CLOEXEC);
    if (count != 2 || inotify_add_watch(watch, arguments[1], IN_MOVED_TO) < 0) {
        perror("watch");
        return 1;
    }
    setvbuf(stdout, 0, _IOLBF, 0);
    puts("watching");
    for (;;) {
        ssize_t length = read(watch, events, sizeof events);
        if (length <= 0) {
            perror("read");
            return 1;
        }
        for (char *at = events; at < events + length;) {
            struct inotify_event *event = (struct inotify_event *)at;
            if (event->len > 0) {
                puts(event->name);
            }
            at += sizeof *event + event->len;
        }
    }
}
