/* Stands where a trainer would: says so, and ends with the exit code that hyperparameters.seed asks for. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(void) {
    const char *config = getenv("FINETUNE_TRAINER_CONFIG");
    const char *seed = config ? strstr(config, "\"seed\":") : NULL;
    int code = seed ? atoi(seed + strlen("\"seed\":")) : 2;
    fprintf(stderr, "ending with %d\n", code);
    return code;
}
