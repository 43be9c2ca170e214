/*
 * A link with latency, a rate and loss, where the kernel has no netem: two TUN devices, packets carried from one to the other.
 *
 *   shaper NAME_A NAME_B DELAY_US RATE_BITS LOSS_PPM
 *
 * Each direction is a queue of 4096 packets (a tail-drop router's) in front of a line of RATE_BITS, then DELAY_US of travel. Whoever
 * started it moves NAME_B into another network namespace and gives both their addresses; it ends with its standard input.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#define SLOTS 16384
#define QUEUE 4096
#define MTU 2048

struct packet { int64_t due; int length; unsigned char data[MTU]; };
struct way { int from, to; unsigned head, tail; int64_t free_at; struct packet *slots; };

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int open_tun(const char *name) {
    struct ifreq request = {0};
    int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    request.ifr_flags = IFF_TUN | IFF_NO_PI;
    strncpy(request.ifr_name, name, IFNAMSIZ - 1);
    if (fd < 0 || ioctl(fd, TUNSETIFF, &request) < 0) { perror(name); exit(1); }
    return fd;
}

static uint32_t chance(void) {
    static uint64_t state = 88172645463325252ULL;
    state ^= state << 13; state ^= state >> 7; state ^= state << 17;
    return (uint32_t)(state % 1000000);
}

/* Take what has arrived: lost, dropped by a full queue, or put in line. */
static void take(struct way *way, int64_t delay, double rate, uint32_t loss) {
    for (int i = 0; i < 256; i++) {
        struct packet *slot = &way->slots[way->head % SLOTS];
        unsigned waiting = 0;
        int length = read(way->from, slot->data, MTU);
        if (length <= 0) return;
        int64_t now = now_ns();
        if (way->head - way->tail >= SLOTS - 1 || chance() < loss) continue;
        if (way->free_at > now) waiting = (unsigned)((way->free_at - now) * rate / 8e9 / 1500);
        if (waiting >= QUEUE) continue;
        if (way->free_at < now) way->free_at = now;
        way->free_at += (int64_t)(length * 8e9 / rate);
        slot->length = length;
        slot->due = way->free_at + delay;
        way->head++;
    }
}

static int64_t give(struct way *way) {
    int64_t now = now_ns();
    while (way->tail != way->head) {
        struct packet *slot = &way->slots[way->tail % SLOTS];
        if (slot->due > now) return slot->due - now;
        if (write(way->to, slot->data, slot->length) < 0 && errno == EAGAIN) return 50000;
        way->tail++;
    }
    return 1000000000LL;
}

int main(int count, char **words) {
    if (count != 6) { fprintf(stderr, "shaper NAME_A NAME_B DELAY_US RATE_BITS LOSS_PPM\n"); return 64; }
    int a = open_tun(words[1]), b = open_tun(words[2]);
    int64_t delay = atoll(words[3]) * 1000;
    double rate = atof(words[4]);
    uint32_t loss = (uint32_t)atoi(words[5]);
    struct way ways[2] = {{a, b, 0, 0, 0, calloc(SLOTS, sizeof(struct packet))}, {b, a, 0, 0, 0, calloc(SLOTS, sizeof(struct packet))}};
    puts("ready");
    fflush(stdout);
    for (;;) {
        struct pollfd watched[3] = {{a, POLLIN, 0}, {b, POLLIN, 0}, {0, POLLIN, 0}};
        int64_t first = give(&ways[0]), second = give(&ways[1]);
        int64_t wait = first < second ? first : second;
        struct timespec timeout = {wait / 1000000000LL, wait % 1000000000LL};
        if (ppoll(watched, 3, &timeout, NULL) < 0) return 1;
        if (watched[2].revents) return 0;
        take(&ways[0], delay, rate, loss);
        take(&ways[1], delay, rate, loss);
    }
}
