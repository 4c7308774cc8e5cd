/* Loaded into a channel's sshd (LD_PRELOAD, by the keeper): it asks for its port in one place.
 *
 * sshd polls its input and its output, which are one virtio-serial port. Linux's virtio_console takes
 * from the queue what has come whenever it is polled, for whatever is asked; when that is done for
 * the output just after there was nothing for the input, nobody is told: the interrupt for it finds
 * an empty queue, and wakes nobody. Seen once in some 4000 round trips. Two entries for one port are
 * made one here, which costs nothing where relaying all bytes would cost half of the speed.
 *
 * An sshd that is static, or so old that it selects, does without.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>

#ifndef __x86_64__
#error "its system calls are those of x86-64"
#endif

static long call5(long number, long a, long b, long c, long d, long e)
{
	long result;
	register long fourth __asm__("r10") = d;
	register long fifth __asm__("r8") = e;
	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(fourth), "r"(fifth)
			 : "rcx", "r11", "memory");
	return result;
}

/* The device that a file is, or 0. */
static unsigned long device_of(int file)
{
	struct stat found;
	if (file < 0 || call5(SYS_fstat, file, (long)&found, 0, 0, 0) || !S_ISCHR(found.st_mode))
		return 0;
	return found.st_rdev;
}

/* sshd's first two entries are its input and its output, from its start to its end. */
__attribute__((visibility("default"))) int ppoll(struct pollfd *entries, nfds_t count,
						 const struct timespec *limit,
						 const sigset_t *signals)
{
	static int input = -1, output = -1;
	struct timespec left = { 0 };
	short wanted = 0, asked = 0;
	int both = 0;
	if (limit)
		left = *limit; /* the kernel writes there */
	if (count >= 2 && entries[0].fd >= 0 && entries[1].fd >= 0) {
		if (entries[0].fd != input || entries[1].fd != output) {
			unsigned long device = device_of(entries[0].fd);
			if (device && device == device_of(entries[1].fd)) {
				input = entries[0].fd;
				output = entries[1].fd;
			}
		}
		both = entries[0].fd == input && entries[1].fd == output;
	}
	if (both) {
		wanted = entries[0].events;
		asked = entries[1].events;
		entries[0].events |= asked;
		entries[1].fd = -1;
	}
	long done = call5(SYS_ppoll, (long)entries, count, (long)(limit ? &left : 0), (long)signals, 8);
	if (both) {
		short told = entries[0].revents;
		short always = POLLERR | POLLHUP | POLLNVAL;
		entries[0].events = wanted;
		entries[1].events = asked;
		entries[1].fd = output;
		if (done >= 0) {
			done -= told != 0;
			entries[0].revents = told & (wanted | always);
			entries[1].revents = told & (asked | always);
			done += (entries[0].revents != 0) + (entries[1].revents != 0);
		}
	}
	if (done < 0) {
		errno = -done;
		return -1;
	}
	return done;
}
