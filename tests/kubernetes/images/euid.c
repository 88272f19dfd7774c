// Prints its effective UID. In the image it is a setuid file of root, so no_new_privs changes the output.
#include <stdio.h>
#include <unistd.h>

int main(void) {
    printf("Effective uid: %d\n", geteuid());
    return 0;
}
