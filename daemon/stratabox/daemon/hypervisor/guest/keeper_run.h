/* A command, and who stays with it. What is asked for comes first on standard input:
 *
 *     "SBX1", size (u32), and so many bytes: token (32 bytes), flags (u32), timeout in ms (u64, 0:
 *     none), and texts with a zero behind each: user, folder (none: the user's home), sandbox, job; a
 *     count (u32) and as many arguments; a count and as many variables
 *
 * What follows is the command's to read. It writes where the keeper would: none of its bytes passes
 * through here. What the keeper has to say is on standard error among them: the token, a letter, and
 * numbers of 16 hexadecimal digits: S (keeper, process) when it was started; F (where, error) when
 * it could not be; E (exit code, signal, flags, ns) when it has ended, with TELL_ROOM after D (bytes
 * of the root file system: all, available, the least that was available, free). `exec_wire.py` reads
 * it.
 *
 * The keeper is the subreaper of all that the command starts, so nothing of that escapes it. All of
 * it is killed when the time is over, when whoever listens has gone, and on SIGTERM; when the command
 * ends by itself, what it has left behind runs on. Time is the guest's own. With TOLD_FIRST the
 * command's process group is sent SIGTERM in the first two cases, and has GRACE_NS to end in.
 */
#include <asm/termbits.h>
#include <linux/prctl.h>
#include <linux/sched.h>
#include <sys/signalfd.h>
#include <sys/vfs.h>
#include <sys/wait.h>

enum { WANTS_INPUT = 1, ON_TERMINAL = 2, DETACHED = 4, TOLD_FIRST = 8, TELL_ROOM = 16 };
enum { TIMED_OUT = 1, WAS_KILLED = 2, NO_MEMORY = 4, DISK_FULL = 8 };
enum { AT_REQUEST = 1, AT_USER, AT_FOLDER, AT_PROGRAM, AT_JOB };

#define TOKEN 32
#define REQUEST_LIMIT (8 << 20)
#define PROCESSES 32768
#define GRACE_NS 5000000000
#define LOOK_MS 1000

struct request {
	char token[TOKEN + 1];
	unsigned flags;
	word timeout_ms;
	char *user, *sandbox, *job;
	const char *folder;
	char **arguments, **variables; /* a free place is behind the variables, for some more */
	word argument_count, variable_count;
};

struct ending {
	long code, signal, flags, duration;
};

/* What the keeper says */

static long port = -1; /* where it says it in frames (keeper_port.h), or -1 */
static void put_frame(char letter, const void *from, word size);
static void leave_port(void);

static char *put_hex(char *to, word number)
{
	for (int shift = 60; shift >= 0; shift -= 4)
		*to++ = "0123456789abcdef"[number >> shift & 15];
	return to;
}

static void say(const struct request *request, char what, word a, word b, word c, word d)
{
	char line[TOKEN + 1 + 4 * 16], *at = line + TOKEN + 1;
	memcpy(line, request->token, TOKEN);
	line[TOKEN] = what;
	at = put_hex(put_hex(put_hex(put_hex(at, a), b), c), d);
	if (port >= 0)
		put_frame('K', line + TOKEN, at - line - TOKEN);
	else
		write_all(2, line, at - line); /* at once, so nothing comes in between */
}

__attribute__((noreturn)) static void fail(const struct request *request, long where, long error)
{
	say(request, 'F', where, -error, 0, 0);
	if (port >= 0)
		leave_port();
	end(125);
}

/* What is asked for */

static void *room(word size)
{
	long at = call(SYS_mmap, 0, size, 3, 0x22, -1, 0); /* anonymous, to read and write */
	return at < 0 && at > -4096 ? 0 : (void *)at;
}

static char *take_text(char **next, char *limit)
{
	char *text = *next;
	while (*next < limit && **next)
		++*next;
	if (*next >= limit)
		end(125);
	++*next;
	return text;
}

static char **take_texts(char **next, char *limit, word *count)
{
	unsigned given;
	if (limit - *next < 4)
		end(125);
	memcpy(&given, *next, 4);
	*next += 4;
	char **texts = given > REQUEST_LIMIT ? 0 : room((given + 16) * sizeof *texts);
	if (!texts)
		end(125);
	for (word at = 0; at < given; at++)
		texts[at] = take_text(next, limit);
	*count = given;
	return texts;
}

static void take_request(struct request *request, long from)
{
	struct {
		char magic[4];
		unsigned size;
	} head;
	if (read_exactly(from, &head, sizeof head) || !alike(head.magic, "SBX1", 4) ||
	    head.size < TOKEN + 12 || head.size > REQUEST_LIMIT)
		end(125);
	char *body = room(head.size), *next = body + TOKEN + 12, *limit = body + head.size;
	if (!body || read_exactly(from, body, head.size))
		end(125);
	memcpy(request->token, body, TOKEN);
	memcpy(&request->flags, body + TOKEN, 4);
	memcpy(&request->timeout_ms, body + TOKEN + 4, 8);
	request->user = take_text(&next, limit);
	request->folder = take_text(&next, limit);
	request->sandbox = take_text(&next, limit);
	request->job = take_text(&next, limit);
	request->arguments = take_texts(&next, limit, &request->argument_count);
	request->variables = take_texts(&next, limit, &request->variable_count);
	if (!request->argument_count)
		end(125);
}

/* Who it is to be */

static char users[256 << 10], groups[256 << 10];

struct account {
	char *name, *home, *shell;
	long uid, gid;
	unsigned group_list[256];
	word group_count;
};

/* The next field of a line, which ends at a colon; `*line` is then behind it. */
static char *take_field(char **line)
{
	char *field = *line;
	while (**line && **line != ':')
		++*line;
	if (**line)
		*(*line)++ = 0;
	return field;
}

static char *take_line(char **next)
{
	char *line = *next;
	if (!*line)
		return 0;
	while (**next && **next != '\n')
		++*next;
	if (**next)
		*(*next)++ = 0;
	return line;
}

static long number_of(const char *text)
{
	long number = take_number(&text);
	return *text ? -1 : number;
}

static void find_groups(struct account *account)
{
	char *next = groups, *line;
	read_file("/etc/group", groups, sizeof groups);
	while ((line = take_line(&next)) && account->group_count < 256) {
		take_field(&line);
		take_field(&line);
		long gid = number_of(take_field(&line));
		while (gid >= 0 && *line) {
			char *member = line;
			while (*line && *line != ',')
				line++;
			if (*line)
				*line++ = 0;
			if (same(member, account->name)) {
				account->group_list[account->group_count++] = gid;
				break;
			}
		}
	}
}

/* Find who is called so, or has that number. */
static long find_account(const char *wanted, struct account *account)
{
	char *next = users, *line;
	long number = number_of(wanted), size = read_file("/etc/passwd", users, sizeof users);
	while (size > 0 && (line = take_line(&next))) {
		char *name = take_field(&line);
		take_field(&line);
		long uid = number_of(take_field(&line)), gid = number_of(take_field(&line));
		if (uid < 0 || gid < 0 || !(same(name, wanted) || (number >= 0 && uid == number)))
			continue;
		take_field(&line);
		account->name = name;
		account->uid = uid;
		account->gid = gid;
		account->home = take_field(&line);
		account->shell = take_field(&line);
		account->group_list[account->group_count++] = gid;
		if (uid)
			find_groups(account);
		return 0;
	}
	if (same(wanted, "root")) { /* without a list of users there is still one */
		*account = (struct account){ .name = "root", .home = "/root", .shell = "/bin/sh" };
		return 0;
	}
	if (number >= 0 && number < 0xffffffff) {
		*account = (struct account){ .name = (char *)wanted, .home = "/", .shell = "/bin/sh",
					     .uid = number, .gid = number, .group_count = 1,
					     .group_list = { number } };
		return 0;
	}
	return -ENOENT;
}

static char *find_variable(const struct request *request, const char *name)
{
	word size = length(name);
	for (word at = 0; at < request->variable_count; at++)
		if (begins(request->variables[at], name) && request->variables[at][size] == '=')
			return request->variables[at] + size + 1;
	return 0;
}

static void add_variable(struct request *request, const char *name, const char *value)
{
	if (find_variable(request, name))
		return;
	word size = length(name) + length(value) + 2;
	char *text = room(size);
	if (text) {
		put(put(put(text, text + size, name), text + size, "="), text + size, value);
		request->variables[request->variable_count++] = text;
	}
}

/* Become the command */

static long find_and_become(struct request *request)
{
	char *name = request->arguments[0], path[4096];
	for (const char *at = name; *at; at++)
		if (*at == '/')
			return call(SYS_execve, name, request->arguments, request->variables);
	const char *next = find_variable(request, "PATH");
	long worst = -ENOENT;
	if (!next)
		next = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
	for (;;) {
		char *to = path;
		while (*next && *next != ':' && to < path + sizeof path - 258)
			*to++ = *next++;
		if (to == path)
			*to++ = '.';
		*to = 0;
		put(put(to, path + sizeof path, "/"), path + sizeof path, name);
		long error = call(SYS_execve, path, request->arguments, request->variables);
		if (error == -EACCES)
			worst = error;
		else if (error != -ENOENT && error != -ENOTDIR && error != -ENAMETOOLONG)
			return error;
		while (*next && *next != ':')
			next++;
		if (!*next++)
			return worst;
	}
}

static void make_terminal_usual(void)
{
	struct termios modes;
	if (call(SYS_ioctl, 0, TCGETS, &modes))
		return;
	modes.c_iflag = ICRNL | IXON | IUTF8;
	modes.c_oflag = OPOST | ONLCR;
	modes.c_cflag |= CREAD | CS8;
	modes.c_lflag = ISIG | ICANON | ECHO | ECHOE | ECHOK | IEXTEN | ECHOCTL | ECHOKE;
	call(SYS_ioctl, 0, TCSETS, &modes);
}

static volatile long failed_at, failed_with;

/* In the child, which has the keeper's memory until it is the command. */
__attribute__((noreturn)) static void become(struct request *request, struct account *account)
{
	word none = 0;
	int pid = call(SYS_getpid);
	if (request->flags & ON_TERMINAL) {
		call(SYS_setpgid, 0, 0);
		call(SYS_ioctl, 0, TIOCSPGRP, &pid); /* its SIGTTOU is blocked */
	} else {
		call(SYS_setsid);
	}
	failed_at = AT_USER;
	failed_with = 0;
	/* root among root's groups already is who it is to be */
	if (account->uid || account->gid) {
		failed_with = call(SYS_setgroups, account->group_count, account->group_list);
		if (!failed_with)
			failed_with = call(SYS_setresgid, account->gid, account->gid, account->gid);
		if (!failed_with)
			failed_with = call(SYS_setresuid, account->uid, account->uid, account->uid);
	}
	if (!failed_with) {
		failed_at = AT_FOLDER;
		failed_with = call(SYS_chdir, request->folder);
	}
	if (!failed_with) {
		failed_at = AT_PROGRAM;
		call(SYS_rt_sigprocmask, SIG_SETMASK, &none, 0, sizeof none);
		failed_with = find_and_become(request);
	}
	end(125);
}

/* The child's process id, when it is the command; or an error, with `failed_at`. */
__attribute__((noinline)) static long start(struct request *request, struct account *account)
{
	long child;
	/* vfork, in line: its child may not return from a function that its parent returns from. */
	__asm__ volatile("syscall"
			 : "=a"(child)
			 : "a"(SYS_vfork)
			 : "rcx", "r11", "memory", "cc");
	if (!child)
		become(request, account);
	if (child > 0 && failed_with) {
		call(SYS_wait4, child, 0, 0, 0);
		return failed_with;
	}
	if (child < 0)
		failed_at = AT_PROGRAM;
	return child;
}

/* All that it has started */

static struct {
	int pid, parent;
} processes[PROCESSES];
static byte is_ours[1 << 22]; /* by process id, which the kernel keeps below that */

static word list_processes(void)
{
	static char list[32 << 10] __attribute__((aligned(8)));
	char path[64], text[512];
	long folder = open_file("/proc", O_RDONLY | O_DIRECTORY, 0), size;
	word count = 0;
	while ((size = call(SYS_getdents64, folder, list, sizeof list)) > 0)
		for (long next = 0; next < size;) {
			struct dirent64 *entry = (struct dirent64 *)(list + next);
			next += entry->d_reclen;
			long pid = number_of(entry->d_name);
			if (pid <= 0 || pid >= (long)sizeof is_ours || count == PROCESSES)
				continue;
			char *to = put(path, path + sizeof path, "/proc/");
			put(put(to, path + sizeof path, entry->d_name), path + sizeof path, "/stat");
			long end_of = read_file(path, text, sizeof text);
			while (end_of > 0 && text[end_of - 1] != ')') /* names hold what they like */
				end_of--;
			if (end_of <= 0 || text[end_of + 1] == 'Z' || text[end_of + 1] == 'X')
				continue;
			const char *parent = text + end_of + 3;
			processes[count].pid = pid;
			long of = take_number(&parent);
			processes[count++].parent = of < 0 || of >= (long)sizeof is_ours ? 0 : of;
		}
	close_file(folder);
	return count;
}

/* Send a signal to all that descends from this process; how many there are. */
static word signal_descendants(int signal)
{
	word count = list_processes(), found = 0;
	int self = call(SYS_getpid), grown = 1;
	is_ours[self] = 1;
	while (grown) { /* parents mostly come first, so mostly twice */
		grown = 0;
		for (word at = 0; at < count; at++)
			if (!is_ours[processes[at].pid] && is_ours[processes[at].parent])
				is_ours[processes[at].pid] = grown = 1;
	}
	is_ours[self] = 0;
	for (word at = 0; at < count; at++)
		if (is_ours[processes[at].pid]) {
			is_ours[processes[at].pid] = 0;
			call(SYS_kill, processes[at].pid, signal);
			found++;
		}
	return found;
}

static void reap_all(long command, int *status)
{
	int other;
	long pid;
	while ((pid = call(SYS_wait4, -1, &other, WNOHANG, 0)) > 0)
		if (pid == command)
			*status = other;
}

/* Kill all of it, and see it gone. Stopped first: what multiplies cannot outrun that. */
static void kill_all(long command, int *status)
{
	for (int round = 0; round < 1000; round++) {
		signal_descendants(SIGSTOP);
		word left = signal_descendants(SIGKILL);
		reap_all(command, status);
		if (!left)
			return;
		sleep_ms(round < 5 ? 1 : 10);
	}
}

/* Why it may have failed */

/* Whether the kernel has killed something for want of memory since `started`. */
static int was_short_of_memory(long started)
{
	static char text[8192];
	long log = open_file("/dev/kmsg", O_RDONLY | O_NONBLOCK, 0), size;
	int found = 0;
	if (log < 0)
		return 0;
	while ((size = call(SYS_read, log, text, sizeof text - 1)) > 0 || size == -EPIPE) {
		if (size < 0)
			continue;
		text[size] = 0;
		const char *at = text;
		for (int commas = 0; *at && commas < 2; at++)
			commas += *at == ',';
		long when = take_number(&at) * 1000;
		while (*at && *at != ';')
			at++;
		for (; when >= started && *at && *at != '\n'; at++)
			found |= begins(at, "Killed process ");
	}
	close_file(log);
	return found;
}

static int is_full(const char *folder)
{
	struct statfs room_left;
	return !call(SYS_statfs, folder, &room_left) && room_left.f_blocks > 0 &&
	       (!room_left.f_bavail || (room_left.f_files > 0 && !room_left.f_ffree));
}

static struct {
	word total, available, least, free;
} disk;

static void look_at_disk(void)
{
	struct statfs room_left;
	if (call(SYS_statfs, "/", &room_left))
		return;
	word unit = room_left.f_frsize ? room_left.f_frsize : room_left.f_bsize;
	disk.available = room_left.f_bavail * unit;
	disk.free = room_left.f_bfree * unit;
	if (!disk.total || disk.available < disk.least)
		disk.least = disk.available;
	disk.total = room_left.f_blocks * unit;
}

static struct ending ending_of(const struct request *request, int status, long flags, long started)
{
	struct ending how = { .flags = flags, .duration = now() - started };
	if (WIFSIGNALED(status))
		how.signal = WTERMSIG(status);
	else
		how.code = WEXITSTATUS(status);
	if (!flags && (how.signal == SIGKILL || how.code == 128 + SIGKILL) &&
	    was_short_of_memory(started))
		how.flags |= NO_MEMORY;
	if ((how.code || how.signal) &&
	    (is_full(request->folder) || is_full("/tmp") || is_full("/")))
		how.flags |= DISK_FULL;
	return how;
}

static long watch_signals(void)
{
	word signals = 1UL << (SIGCHLD - 1) | 1UL << (SIGTERM - 1) | 1UL << (SIGHUP - 1) |
		       1UL << (SIGINT - 1) | 1UL << (SIGQUIT - 1) | 1UL << (SIGTTOU - 1) |
		       1UL << (SIGTSTP - 1) | 1UL << (SIGPIPE - 1);
	call(SYS_rt_sigprocmask, SIG_BLOCK, &signals, 0, sizeof signals);
	signals = 1UL << (SIGCHLD - 1) | 1UL << (SIGTERM - 1) | 1UL << (SIGHUP - 1);
	return call(SYS_signalfd4, -1, &signals, sizeof signals, SFD_CLOEXEC | SFD_NONBLOCK);
}

/* A command that is attended to until its end. */
struct care {
	const struct request *request;
	long command, signals, started, deadline;
	long why; /* it was told to end */
};

static struct care begin_care(const struct request *request, long command, long signals,
			      long started)
{
	return (struct care){ .request = request, .command = command, .signals = signals,
			      .started = started,
			      .deadline = request->timeout_ms ?
						started + (long)request->timeout_ms * 1000000 :
						0 };
}

/* Milliseconds until it must be looked after at the latest; -1: when something happens. */
static long until_due(const struct care *care)
{
	long left = care->deadline ? (care->deadline - now() + 999999) / 1000000 : -1;
	if (care->deadline && left < 0)
		left = 0;
	if (left > 1 << 30)
		left = 1 << 30;
	if (care->request->flags & TELL_ROOM) {
		look_at_disk();
		if (left < 0 || left > LOOK_MS)
			left = LOOK_MS;
	}
	return left;
}

/* See whether it has ended, and bring that about where it is due. `has_gone`: nobody listens any
 * more, which is said once. Whether it has ended: `how` then says how. */
static int look_after(struct care *care, int has_gone, struct ending *how)
{
	const struct request *request = care->request;
	long flags = 0, at_once = 0, pid;
	int status = 0, other;
	struct signalfd_siginfo told;
	while (call(SYS_read, care->signals, &told, sizeof told) > 0)
		if (told.ssi_signo == SIGTERM)
			at_once = flags |= WAS_KILLED;
		else if (told.ssi_signo == SIGHUP && request->flags & ON_TERMINAL && !care->why)
			flags |= WAS_KILLED;
	while ((pid = call(SYS_wait4, -1, &other, WNOHANG, 0)) > 0)
		if (pid == care->command) {
			if (care->why)
				kill_all(care->command, &status); /* what it has left behind */
			*how = ending_of(request, other, care->why, care->started);
			return 1;
		}
	if (has_gone)
		flags |= WAS_KILLED;
	if (care->deadline && now() >= care->deadline)
		flags |= care->why ? care->why : TIMED_OUT;
	if (flags && request->flags & TOLD_FIRST && !care->why && !at_once) {
		call(SYS_kill, -care->command, SIGTERM);
		care->why = flags;
		care->deadline = now() + GRACE_NS;
	} else if (flags) {
		kill_all(care->command, &status);
		*how = ending_of(request, status, care->why | flags, care->started);
		return 1;
	}
	return 0;
}

/* Wait for a command's end. `listener`: where somebody listens to it. */
static struct ending attend(const struct request *request, long command, long signals, long listener,
			    long started)
{
	struct care care = begin_care(request, command, signals, started);
	struct ending how;
	for (;;) {
		struct pollfd waits[] = { { .fd = signals, .events = POLLIN },
					  { .fd = care.why ? -1 : listener } };
		call(SYS_poll, waits, 2, until_due(&care));
		if (look_after(&care, waits[1].revents & (POLLERR | POLLHUP | POLLNVAL), &how))
			return how;
	}
}

static void say_end(const struct request *request, const struct ending *how)
{
	if (request->flags & TELL_ROOM) {
		look_at_disk();
		say(request, 'D', disk.total, disk.available, disk.least, disk.free);
	}
	say(request, 'E', how->code, how->signal, how->flags, how->duration);
}

/* Find who and where, and add what every command has in its environment. */
static void prepare(struct request *request, struct account *account)
{
	long error = find_account(*request->user ? request->user : "root", account);
	if (error)
		fail(request, AT_USER, error);
	add_variable(request, "HOME", account->home);
	add_variable(request, "USER", account->name);
	add_variable(request, "LOGNAME", account->name);
	add_variable(request, "SHELL", *account->shell ? account->shell : "/bin/sh");
	/* A home that is not there is nobody's wish. */
	if (!*request->folder)
		request->folder = call(SYS_access, account->home, 1) ? "/" : account->home;
	add_variable(request, "PWD", request->folder);
}

static void see_to_job(struct request *request, struct account *account, long signals);

__attribute__((noreturn)) static void run(char **environment)
{
	static struct request request;
	static struct account account;
	take_request(&request, 0);
	long signals = watch_signals();
	if (request.flags & ON_TERMINAL) {
		for (char **each = environment; *each; each++)
			if (begins(*each, "TERM="))
				add_variable(&request, "TERM", *each + 5);
		make_terminal_usual();
	}
	prepare(&request, &account);
	if (request.flags & DETACHED)
		see_to_job(&request, &account, signals);
	call(SYS_prctl, PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
	if (!(request.flags & WANTS_INPUT) && !(request.flags & ON_TERMINAL))
		call(SYS_dup2, open_file("/dev/null", O_RDONLY, 0), 0);
	long started = now(), command = start(&request, &account);
	if (command < 0)
		fail(&request, failed_at, command);
	say(&request, 'S', call(SYS_getpid), command, 0, 0);
	if (!(request.flags & ON_TERMINAL))
		close_file(0); /* it is the command's: who writes there must see it closed */
	struct ending how = attend(&request, command, signals, 1, started);
	say_end(&request, &how);
	end(how.signal ? 128 + how.signal : how.code);
}
