/*
 * A static program with a long iterative computation, for tests of checkpointing.
 *
 *   counter N [MILLISECONDS]
 *
 * Prints "count 1" to "count N", one line each MILLISECONDS (default 100), then a hash over all of
 * them. Counts on a monotonic clock only to pace itself: the output depends on N only.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

int main(int argc, char **argv)
{
    long n = argc > 1 ? atol(argv[1]) : 100;
    long pause = argc > 2 ? atol(argv[2]) : 100;
    uint64_t hash = 14695981039346656037u; /* FNV-1a */
    for (long i = 1; i <= n; i++) {
        struct timespec left = {pause / 1000, pause % 1000 * 1000000};
        while (nanosleep(&left, &left))
            ;
        hash = (hash ^ (uint64_t)i) * 1099511628211u;
        printf("count %ld\n", i);
        fflush(stdout);
    }
    printf("hash %016llx\n", (unsigned long long)hash);
    return 0;
}
