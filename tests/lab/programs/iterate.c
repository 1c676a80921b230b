/*
 * An OpenMP program with a long iterative computation, for tests of checkpointing.
 *
 *   iterate STEPS [EVERY [SIZE]]
 *
 * Relaxes a SIZE x SIZE grid STEPS times, prints one line each EVERY steps and a hash of the grid
 * at the end. The output depends on the arguments only, whatever the number of threads.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Not atol(): with a newer C library it would bind to a symbol that the image's lacks. */
static long number(const char *text)
{
    long value = 0;
    for (; *text >= '0' && *text <= '9'; text++)
        value = value * 10 + (*text - '0');
    return value;
}

int main(int argc, char **argv)
{
    long steps = argc > 1 ? number(argv[1]) : 1000;
    long every = argc > 2 ? number(argv[2]) : 100;
    long size = argc > 3 ? number(argv[3]) : 256;
    if (steps < 1 || every < 1 || size < 3) {
        fprintf(stderr, "usage: iterate STEPS [EVERY [SIZE]]\n");
        return 2;
    }
    double *now = calloc(size * size, sizeof *now), *next = calloc(size * size, sizeof *next);
    if (!now || !next) {
        fprintf(stderr, "iterate: no memory for a grid of %ld x %ld\n", size, size);
        return 1;
    }
    for (long j = 0; j < size; j++)
        now[j] = next[j] = 100.0;

    for (long step = 1; step <= steps; step++) {
#pragma omp parallel for
        for (long i = 1; i < size - 1; i++)
            for (long j = 1; j < size - 1; j++)
                next[i * size + j] = 0.25 * (now[(i - 1) * size + j] + now[(i + 1) * size + j] +
                                             now[i * size + j - 1] + now[i * size + j + 1]);
        double *swap = now;
        now = next;
        next = swap;
        if (step % every == 0) {
            /* Summed in order, not in parallel: the same to the last bit in every run. */
            double change = 0;
            for (long k = 0; k < size * size; k++)
                change += (now[k] - next[k]) * (now[k] - next[k]);
            printf("step %ld change %.17g\n", step, change);
            fflush(stdout);
        }
    }

    uint64_t hash = 14695981039346656037u; /* FNV-1a */
    for (long k = 0; k < size * size; k++) {
        unsigned char bytes[sizeof(double)];
        memcpy(bytes, &now[k], sizeof bytes);
        for (unsigned b = 0; b < sizeof bytes; b++)
            hash = (hash ^ bytes[b]) * 1099511628211u;
    }
    printf("hash %016llx\n", (unsigned long long)hash);
    return 0;
}
