/* Runs in a guest: does as it is told on its standard input, then becomes a command.
 *
 *     wake [FOLDER PROGRAM ARGUMENT...]
 *
 * Without KVM a shell takes 20 to 30 ms of a guest, and each program that it starts as much again;
 * this one, static and without a libc, some 5. wake.py beside this says what it can be told, and
 * how. All of it is said by the daemon: nothing here decides what a guest is to be.
 *
 * An order is one byte that says what to do and four fields: a name for it, and up to three
 * operands. A field is its length (two bytes, the low one first), its bytes, and a zero. What is not
 * there in the guest need not be changed, nor what is a link where none may be followed; when an
 * order fails otherwise, those that follow under the same name are left out, and its name is told:
 * the first line of standard error is the value of STRATABOX_EXEC, a blank, and the names. Without
 * orders there is no such line.
 *
 * The command gets a session of its own, and /dev/null to read. As with a shell, the exit code is
 * 127 when there is no such program, and 126 when it, or FOLDER, cannot be used.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>

#ifndef __x86_64__
#error "its system calls are those of x86-64"
#endif

#define MARKER "STRATABOX_EXEC"
#define ORDERS (32 << 10)
#define LINES (32 << 10)
#define PATH_ROOM 4096
#define LATEST 300 /* seconds; a hardware clock that differs by more is one of its own */

struct field {
	const char *at; /* a zero follows its last byte */
	unsigned long size;
};

struct order {
	char what;
	struct field name, a, b, c;
};

static char orders[ORDERS], lines[LINES], changed[2 * LINES];
static char missed[512];

/* Without a libc */

__attribute__((used)) void *memcpy(void *to, const void *from, unsigned long size)
{
	void *start = to;
	__asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size) : : "memory");
	return start;
}

__attribute__((used)) void *memset(void *to, int value, unsigned long size)
{
	void *start = to;
	__asm__ volatile("rep stosb" : "+D"(to), "+c"(size) : "a"(value) : "memory");
	return start;
}

static long call4(long number, long a, long b, long c, long d)
{
	long result;
	register long fourth __asm__("r10") = d;
	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(fourth)
			 : "rcx", "r11", "memory");
	return result;
}

static long call(long number, long a, long b, long c)
{
	return call4(number, a, b, c, 0);
}

static unsigned long length(const char *text)
{
	unsigned long size = 0;
	while (text[size])
		size++;
	return size;
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

static int ends(const char *text, const char *with)
{
	unsigned long size = length(text), last = length(with);
	return size >= last && same(text + size - last, with);
}

/* One text of three; 0, or -ENAMETOOLONG. */
static long join(char *to, unsigned long room, const char *a, const char *b, const char *c)
{
	const char *parts[] = { a, b, c };
	for (int i = 0; i < 3; i++) {
		unsigned long size = length(parts[i]);
		if (size >= room)
			return -ENAMETOOLONG;
		memcpy(to, parts[i], size);
		to += size;
		room -= size;
	}
	*to = 0;
	return 0;
}

static long open_file(const char *path, int flags, int mode)
{
	return call(SYS_open, (long)path, flags | O_CLOEXEC, mode);
}

static void close_file(long file)
{
	call(SYS_close, file, 0, 0);
}

static long write_all(long file, const char *from, unsigned long size)
{
	while (size) {
		long done = call(SYS_write, file, (long)from, size);
		if (done <= 0)
			return done ? done : -EIO;
		from += done;
		size -= done;
	}
	return 0;
}

/* What is read until the end; -EFBIG when that is more than `room`, or all of it. */
static long read_all(long file, char *to, unsigned long room)
{
	unsigned long size = 0;
	while (size < room) {
		long done = call(SYS_read, file, (long)to + size, room - size);
		if (done < 0)
			return done;
		if (!done)
			return size;
		size += done;
	}
	return -EFBIG;
}

/* A file's text with a zero behind it. */
static long read_file(const char *path, char *to, unsigned long room)
{
	long file = open_file(path, O_RDONLY, 0);
	if (file < 0)
		return file;
	long size = read_all(file, to, room - 1);
	close_file(file);
	to[size < 0 ? 0 : size] = 0;
	return size;
}

/* All that a file holds. Not emptied first, only cut where it was longer: its blocks would be freed,
 * found and described anew, which costs an emulated guest 8 ms and a copy's host 2 MB. It is begun
 * to be written to the disk, as ext4 does by itself with a file that was emptied. */
static long write_file(const char *path, int flags, int mode, const char *from, unsigned long size)
{
	long file = open_file(path, O_WRONLY | (flags & ~O_TRUNC), mode);
	if (file < 0)
		return file;
	long before = call(SYS_lseek, file, 0, SEEK_END);
	if (before > 0)
		call(SYS_lseek, file, 0, SEEK_SET);
	long error = write_all(file, from, size);
	if (!error && before > (long)size)
		error = call(SYS_ftruncate, file, size, 0);
	call4(SYS_sync_file_range, file, 0, 0, SYNC_FILE_RANGE_WRITE);
	close_file(file);
	return error;
}

/* Let `act` have the path of everything in a folder that is called so; ends at its first error. */
static long for_each(const char *folder, const char *prefix, const char *suffix,
		     long (*act)(const char *path, const char *name, const char *with),
		     const char *with)
{
	char list[2048] __attribute__((aligned(8))), path[512];
	long file = open_file(folder, O_RDONLY | O_DIRECTORY, 0);
	long size = file, error = 0;
	while (!error && size >= 0) {
		size = call(SYS_getdents64, file, (long)list, sizeof list);
		if (size <= 0)
			break;
		for (long at = 0; !error && at < size;) {
			struct dirent64 *entry = (struct dirent64 *)(list + at);
			at += entry->d_reclen;
			const char *name = entry->d_name;
			if (name[0] == '.' || !begins(name, prefix) || !ends(name, suffix))
				continue;
			error = join(path, sizeof path, folder, "/", name);
			if (!error)
				error = act(path, name, with);
		}
	}
	if (file >= 0)
		close_file(file);
	return error ? error : size;
}

/* What it can be told */

static long number(const char *text)
{
	long value = 0;
	while (*text >= '0' && *text <= '9')
		value = value * 10 + *text++ - '0';
	return value;
}

/* The hardware's clock is QEMU's, and so the host's, in whole seconds: a guest that has little of a
 * CPU may come here seconds after the time was sent. */
static long set_clock(struct field time, struct field hardware)
{
	struct timespec now;
	char text[24];
	if (time.size != sizeof now)
		return -EINVAL;
	memcpy(&now, time.at, sizeof now);
	long later = read_file(hardware.at, text, sizeof text) > 0 ? number(text) : 0;
	if (later > now.tv_sec && later < now.tv_sec + LATEST) {
		now.tv_sec = later;
		now.tv_nsec = 0;
	}
	return call(SYS_clock_settime, CLOCK_REALTIME, (long)&now, 0);
}

/* Bytes that are written are mixed in, but heard of only at the next reseeding. */
static long seed(struct field bytes)
{
	long file = open_file("/dev/urandom", O_WRONLY, 0);
	if (file < 0)
		return -EIO; /* never "it need not be changed" */
	long error = write_all(file, bytes.at, bytes.size);
	if (!error)
		error = call(SYS_ioctl, file, RNDRESEEDCRNG, 0);
	close_file(file);
	return error;
}

static long put(struct field path, struct field how, struct field content)
{
	int flags_and_mode[2];
	if (how.size != sizeof flags_and_mode)
		return -EINVAL;
	memcpy(flags_and_mode, how.at, sizeof flags_and_mode);
	return write_file(path.at, flags_and_mode[0], flags_and_mode[1], content.at, content.size);
}

/* Have each line that begins with a word be another; in place, which keeps owner, mode, mounts. */
static long set_line(struct field path, struct field word, struct field line)
{
	long size = read_file(path.at, lines, sizeof lines), made = 0;
	if (size < 0)
		return size;
	int found = 0;
	for (long at = 0, next; at < size; at = next) {
		for (next = at; next < size && lines[next] != '\n'; next++)
			;
		next += next < size;
		char after = begins(lines + at, word.at) ? lines[at + word.size] : 0;
		int is_it = after == ' ' || after == '\t';
		const char *from = is_it ? line.at : lines + at;
		long count = is_it ? (long)line.size : next - at;
		if (made + count > (long)sizeof changed)
			return -EFBIG;
		memcpy(changed + made, from, count);
		made += count;
		found |= is_it;
	}
	return found ? write_file(path.at, 0, 0, changed, made) : 0;
}

static long remove(const char *path, const char *name, const char *with)
{
	(void)name, (void)with;
	return call(SYS_unlink, (long)path, 0, 0);
}

/* Have a daemon read its files again, if it is the one that it should be. */
static long hang_up(struct field pid_file, struct field name)
{
	char pid[16], path[64], found[32];
	long size = read_file(pid_file.at, pid, sizeof pid), digits = 0;
	if (size < 0)
		return size;
	while (pid[digits] >= '0' && pid[digits] <= '9')
		digits++;
	pid[digits] = 0;
	if (number(pid) < 2 || join(path, sizeof path, "/proc/", pid, "/comm"))
		return 0;
	size = read_file(path, found, sizeof found);
	if (size < 1)
		return 0;
	found[size - 1] = 0; /* its newline */
	return same(found, name.at) ? call(SYS_kill, number(pid), SIGHUP, 0) : 0;
}

static long set_address(const char *path, const char *name, const char *address)
{
	(void)path;
	struct ifreq request = { 0 };
	long error = join(request.ifr_name, sizeof request.ifr_name, name, "", "");
	long net = call(SYS_socket, AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (error || net < 0)
		return error ? error : net;
	error = call(SYS_ioctl, net, SIOCGIFHWADDR, (long)&request);
	if (!error) {
		memcpy(request.ifr_hwaddr.sa_data, address, 6);
		error = call(SYS_ioctl, net, SIOCSIFHWADDR, (long)&request);
	}
	close_file(net);
	return error;
}

static long set_addresses(const char *device, const char *name, const char *address)
{
	char folder[600];
	(void)name;
	long error = join(folder, sizeof folder, device, "/net", "");
	return error ? error : for_each(folder, "", "", set_address, address);
}

static long obey(const struct order *order)
{
	const char *path = order->a.at;
	switch (order->what) {
	case 'c': /* clock: a timespec, file with the hardware's seconds */
		return set_clock(order->a, order->b);
	case 'r': /* random numbers: bytes */
		return seed(order->a);
	case 'h': /* host name */
		return call(SYS_sethostname, (long)path, order->a.size, 0);
	case 'w': /* write: path, flags of open and mode (two ints), content */
		return put(order->a, order->b, order->c);
	case 'm': /* move: path, path */
		return call(SYS_rename, (long)path, (long)order->b.at, 0);
	case 'd': /* delete: folder, how the names begin, how they end */
		return for_each(path, order->b.at, order->c.at, remove, 0);
	case 'l': /* line: path, the line's first word, the new line with its newline */
		return set_line(order->a, order->b, order->c);
	case 'k': /* SIGHUP: file with the process's number, its name */
		return hang_up(order->a, order->b);
	case 'a': /* address: folder of a virtio network card in sysfs, MAC address (six bytes) */
		return order->b.size == 6 ? for_each(path, "virtio", "", set_addresses, order->b.at)
					  : -EINVAL;
	default:
		return -ENOSYS;
	}
}

/* Orders */

static int take_field(const char **next, const char *end, struct field *field)
{
	const unsigned char *head = (const unsigned char *)*next;
	if (end - *next < 3)
		return 0;
	field->size = head[0] | head[1] << 8;
	field->at = *next + 2;
	if ((long)field->size >= end - field->at || field->at[field->size])
		return 0;
	*next = field->at + field->size + 1;
	return 1;
}

static int take_order(const char **next, const char *end, struct order *order)
{
	order->what = *(*next)++;
	return take_field(next, end, &order->name) && take_field(next, end, &order->a) &&
	       take_field(next, end, &order->b) && take_field(next, end, &order->c);
}

static void miss(const char *name)
{
	static unsigned long size;
	if (!join(missed + size, sizeof missed - size, size ? ", " : "", name, ""))
		size += length(missed + size);
}

static void obey_all(const char *next, long size)
{
	struct order order;
	const char *end = next + size, *failed = 0;
	long mask = call(SYS_umask, 022, 0, 0);
	if (size < 0)
		miss("all: there is too much of it");
	while (size > 0 && next < end) {
		if (!take_order(&next, end, &order)) {
			miss("the rest: it makes no sense");
			break;
		}
		if (failed && same(failed, order.name.at))
			continue;
		long error = obey(&order);
		if (error < 0 && error != -ENOENT && error != -ELOOP) {
			failed = order.name.at;
			miss(failed);
		}
	}
	call(SYS_umask, mask, 0, 0);
}

/* The command */

static const char *value(char **environment, const char *name)
{
	unsigned long size = length(name);
	for (; *environment; environment++)
		if (begins(*environment, name) && (*environment)[size] == '=')
			return *environment + size + 1;
	return 0;
}

static void complain(const char *about, long error)
{
	const char *words = error == -ENOENT	    ? "not found"
			    : error == -ENOTDIR	    ? "not a directory"
			    : error == -EACCES	    ? "permission denied"
			    : error == -E2BIG	    ? "argument list too long"
			    : error == -ENAMETOOLONG ? "name too long"
						    : "cannot be used";
	write_all(2, about, length(about));
	write_all(2, ": ", 2);
	write_all(2, words, length(words));
	write_all(2, "\n", 1);
}

static __attribute__((noreturn)) void end(int code)
{
	for (;;)
		call(SYS_exit_group, code, 0, 0);
}

/* Become a program; `arguments` has room for one more in front. */
static long become(const char *path, char **arguments, char **environment)
{
	long error = call(SYS_execve, (long)path, (long)arguments, (long)environment);
	if (error != -ENOEXEC)
		return error;
	/* A script that does not say whose: the shell's, as everywhere. */
	arguments[-1] = "/bin/sh";
	arguments[0] = (char *)path;
	return call(SYS_execve, (long)"/bin/sh", (long)(arguments - 1), (long)environment);
}

static long find_and_become(char **arguments, char **environment)
{
	static char folder[PATH_ROOM], path[PATH_ROOM];
	const char *name = arguments[0], *next = value(environment, "PATH");
	long worst = -ENOENT;
	for (const char *at = name; *at; at++)
		if (*at == '/')
			return become(name, arguments, environment);
	while (next) {
		unsigned long size = 0;
		while (next[size] && next[size] != ':')
			size++;
		if (size < sizeof folder) {
			memcpy(folder, next, size);
			folder[size] = 0;
			long error = join(path, sizeof path, size ? folder : ".", "/", name);
			if (!error)
				error = become(path, arguments, environment);
			if (error == -EACCES)
				worst = error;
			else if (error != -ENOENT && error != -ENOTDIR && error != -ENAMETOOLONG)
				return error;
		}
		next = next[size] ? next + size + 1 : 0;
	}
	return worst;
}

static __attribute__((used, noreturn)) void begin(long *stack)
{
	long count = stack[0];
	char **arguments = (char **)(stack + 1), **environment = arguments + count + 1;
	long size = read_all(0, orders, sizeof orders);
	if (size > 0 || size == -EFBIG) {
		const char *marker = value(environment, MARKER);
		obey_all(orders, size);
		if (marker) {
			/* One write: whoever reads it sees all of it or nothing. */
			static char line[1024];
			if (!join(line, sizeof line - 1, marker, " ", missed)) {
				unsigned long last = length(line);
				line[last] = '\n';
				write_all(2, line, last + 1);
			}
		}
		long null = open_file("/dev/null", O_RDONLY, 0);
		if (null >= 0)
			call(SYS_dup2, null, 0, 0);
	}
	if (count < 2)
		end(0);
	long error = call(SYS_chdir, (long)arguments[1], 0, 0);
	if (error < 0) {
		complain(arguments[1], error);
		end(126);
	}
	if (count < 3)
		end(0);
	call(SYS_setsid, 0, 0, 0);
	error = find_and_become(arguments + 2, environment);
	complain(arguments[2], error);
	end(error == -ENOENT ? 127 : 126);
}

__asm__(".globl _start\n"
	"_start:\n"
	"	xor %ebp, %ebp\n"
	"	mov %rsp, %rdi\n"
	"	and $-16, %rsp\n"
	"	call begin\n");
