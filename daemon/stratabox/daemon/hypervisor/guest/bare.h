/* A program without a libc: system calls, and what little of strings is needed. For keeper.c; what is
 * 20 KiB and static starts in an emulated guest ten times as fast as the smallest shell.
 * With WITH_LIBC it is for a program that has one, and its own way in. */
#ifndef BARE_H
#define BARE_H
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <time.h>

#ifndef __x86_64__
#error "its system calls are those of x86-64"
#endif

typedef unsigned long word;
typedef unsigned char byte;

#ifndef WITH_LIBC
__attribute__((used)) void *memcpy(void *to, const void *from, word size)
{
	void *start = to;
	__asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size) : : "memory");
	return start;
}

__attribute__((used)) void *memset(void *to, int value, word size)
{
	void *start = to;
	__asm__ volatile("rep stosb" : "+D"(to), "+c"(size) : "a"(value) : "memory");
	return start;
}
#endif

static long call6(long number, long a, long b, long c, long d, long e, long f)
{
	long result;
	register long fourth __asm__("r10") = d;
	register long fifth __asm__("r8") = e;
	register long sixth __asm__("r9") = f;
	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(fourth), "r"(fifth), "r"(sixth)
			 : "rcx", "r11", "memory");
	return result;
}

#define call(number, ...) CALL(number, ##__VA_ARGS__, 0, 0, 0, 0, 0, 0)
#define CALL(number, a, b, c, d, e, f, ...)                                                        \
	call6(number, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))

__attribute__((noreturn)) static void end(int code)
{
	for (;;)
		call(SYS_exit_group, code);
}

static word length(const char *text)
{
	word size = 0;
	while (text[size])
		size++;
	return size;
}

/* Whether the first `size` bytes are the same. */
static int alike(const void *one, const void *other, word size)
{
	for (word at = 0; at < size; at++)
		if (((const byte *)one)[at] != ((const byte *)other)[at])
			return 0;
	return 1;
}

static int begins(const char *text, const char *with)
{
	while (*with)
		if (*text++ != *with++)
			return 0;
	return 1;
}

static int same(const char *one, const char *other)
{
	return begins(one, other) && length(one) == length(other);
}

/* Text put behind text; where it ends now. Nothing is written at or behind `limit` but a zero. */
static char *put(char *to, const char *limit, const char *text)
{
	while (*text && to < limit - 1)
		*to++ = *text++;
	*to = 0;
	return to;
}

static char *put_number(char *to, const char *limit, long number)
{
	char digits[24], *at = digits + sizeof digits - 1;
	*at = 0;
	word rest = number < 0 ? -(word)number : (word)number;
	do
		*--at = '0' + rest % 10;
	while (rest /= 10);
	if (number < 0)
		*--at = '-';
	return put(to, limit, at);
}

/* A number at the start of a text; `*text` is then behind it. -1: there is none. */
static long take_number(const char **text)
{
	long number = 0, digits = 0;
	for (; **text >= '0' && **text <= '9' && digits < 18; ++*text, digits++)
		number = number * 10 + (**text - '0');
	return digits ? number : -1;
}

static long open_file(const char *path, int flags, int mode)
{
	return call(SYS_open, path, flags | O_CLOEXEC, mode);
}

static void close_file(long file)
{
	call(SYS_close, file);
}

static long write_all(long file, const void *from, word size)
{
	const char *next = from;
	while (size) {
		long done = call(SYS_write, file, next, size);
		if (done == -EINTR)
			continue;
		if (done == -EAGAIN) {
			struct pollfd writable = { .fd = file, .events = POLLOUT };
			call(SYS_poll, &writable, 1, -1);
			continue;
		}
		if (done <= 0)
			return done ? done : -EIO;
		next += done;
		size -= done;
	}
	return 0;
}

/* Exactly so many bytes, or an error; -ENODATA where the end comes first. */
static long read_exactly(long file, void *to, word size)
{
	char *next = to;
	while (size) {
		long done = call(SYS_read, file, next, size);
		if (done == -EINTR)
			continue;
		if (done <= 0)
			return done ? done : -ENODATA;
		next += done;
		size -= done;
	}
	return 0;
}

/* A file's text, as much as there is room for, with a zero behind it; its size. */
static long read_file(const char *path, char *to, word room)
{
	long file = open_file(path, O_RDONLY | O_NONBLOCK, 0), size = 0;
	if (file < 0)
		return file;
	while ((word)size < room - 1) {
		long done = call(SYS_read, file, to + size, room - 1 - size);
		if (done <= 0)
			break;
		size += done;
	}
	close_file(file);
	to[size] = 0;
	return size;
}

/* Nanoseconds of the guest's own time, which stands still while it is paused. */
static long now(void)
{
	struct timespec time = { 0 };
	call(SYS_clock_gettime, CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000L + time.tv_nsec;
}

static void sleep_ms(long milliseconds)
{
	struct timespec time = { milliseconds / 1000, milliseconds % 1000 * 1000000 };
	call(SYS_nanosleep, &time, 0);
}

#ifndef WITH_LIBC
/* The way in. `main_of` never returns. */
__attribute__((noreturn)) static void main_of(int count, char **arguments, char **environment);

static __attribute__((used, noreturn)) void begin(long *stack)
{
	char **arguments = (char **)(stack + 1);
	main_of(stack[0], arguments, arguments + stack[0] + 1);
}

__asm__(".globl _start\n"
	"_start:\n"
	"	xor %ebp, %ebp\n"
	"	mov %rsp, %rdi\n"
	"	and $-16, %rsp\n"
	"	call begin\n");
#endif
#endif
