/* One command over a port of its own, without an sshd: what a guest that goes on from saved memory has
 * at hand at once. There sshd must have 0.3 s to be spoken to, being emulated anew; this needs no more
 * than what a command takes to start.
 *
 * For each command a process waits in the write of its greeting, which the kernel takes when the host
 * has connected, with all done that can be done before. Then, in bytes, the low ones first:
 *
 *     guest     "stratabox-exec 1\n"
 *     daemon    "SBXP", a zero (u32), the time in ns since 1970 (u64; 0: the guest has the right one),
 *               64 random bytes for its kernel; and a request as keeper_run.h has it
 *     guest     the request's token (32 bytes), and frames
 *
 * A frame is a letter, the size of what follows (u32), and that. What each side is sent is bounded: by
 * as much as it has said that it has room for.
 *
 *     guest     'K' what the keeper says: a letter and four numbers, as in keeper_run.h; and T (error
 *                   of the clock, of the random numbers), before all else where it was told a time
 *               'O', 'E' what the command has printed, on its standard output and error
 *               'I' (u32) so many bytes of input were taken: as many more may be sent
 *               'Z' it has ended, and nobody has its output open: nothing more comes
 *     daemon    'I' input; INPUT_ROOM bytes may be on their way
 *               'C' the input ends here
 *               'O' (u32) so many bytes of output were taken; OUTPUT_ROOM may be on their way
 *               'S' (u32) a signal for the command's process group; SIGKILL: for all that it started
 *
 * A host that hangs up ends it all, as keeper_run.h says; then the port is opened anew, so that nobody
 * gets what was sent to another. Until the daemon has heard a greeting it says nothing: what runs on the
 * port then is an earlier one's, and is not spoken to. A guest that goes on from saved memory sees the
 * host hang up first. `exec_port.py` is the other end.
 */
#include <linux/random.h>

#define GREETING "stratabox-exec 1\n"
#define AT_ONCE (32 << 10) /* the kernel takes that much in one write */
#define HEAD 5
#define SPARED 512 /* of it, for all but output */
#define OUTPUT_ROOM (512 << 10)
#define INPUT_ROOM (64 << 10)
#define SURE_NS 500000000
#define LATEST 300 /* seconds; a hardware clock that differs by more is one of its own */

struct told {
	char magic[4];
	unsigned none;
	long time;
	byte seed[64];
};

/* Frames to be written */
static byte going[AT_ONCE];
static word going_size, going_from;

/* What comes: a frame's head, and how much of it is still to come. */
static byte head[HEAD], words[4];
static word head_size, left_of_frame;

/* Input that the command has not taken yet, and how much it has since that was told. */
static byte input[INPUT_ROOM];
static word input_size, input_from;
static unsigned input_taken;
static int input_ended;

static long output_room = OUTPUT_ROOM;

static void put_frame(char letter, const void *from, word size)
{
	if (going_size + HEAD + size > sizeof going)
		end(125); /* there is always room for what is put here */
	unsigned count = size;
	going[going_size] = letter;
	memcpy(going + going_size + 1, &count, 4);
	memcpy(going + going_size + HEAD, from, size);
	going_size += HEAD + size;
}

/* Write what the port takes now. An error: the host has gone. */
static long write_frames(void)
{
	while (going_from < going_size) {
		long done = call(SYS_write, port, going + going_from, going_size - going_from);
		if (done == -EINTR)
			continue;
		if (done == -EAGAIN)
			return 0;
		if (done <= 0)
			return done ? done : -EIO;
		going_from += done;
	}
	going_size = going_from = 0;
	return 0;
}

/* All that is left to say is to say that; then the host is waited for to hang up. */
static void leave_port(void)
{
	put_frame('Z', 0, 0);
	for (;;) {
		if (write_frames())
			end(0);
		struct pollfd wait = { .fd = port, .events = going_size ? POLLOUT : 0 };
		call(SYS_poll, &wait, 1, -1);
		if (wait.revents & (POLLERR | POLLHUP | POLLNVAL))
			end(0);
	}
}

/* The hardware's clock is QEMU's, and so the host's, in whole seconds: it is asked where what was sent
 * may have taken long. */
static long set_clock(long time, int is_late)
{
	struct timespec then = { time / 1000000000, time % 1000000000 };
	char text[24];
	const char *at = text;
	if (is_late && read_file("/sys/class/rtc/rtc0/since_epoch", text, sizeof text) > 0) {
		long later = take_number(&at);
		if (later > then.tv_sec && later < then.tv_sec + LATEST)
			then = (struct timespec){ later, 0 };
	}
	return call(SYS_clock_settime, CLOCK_REALTIME, &then);
}

/* Bytes that are written are mixed in, but heard of only at the next reseeding. */
static long reseed(long random, const byte *seed, word size)
{
	long error = random < 0 ? random : write_all(random, seed, size);
	return error ? error : call(SYS_ioctl, random, RNDRESEEDCRNG, 0);
}

static void signal_command(long command, int signal)
{
	long self = call(SYS_getpid);
	if (signal == SIGKILL) /* as whoever has no port says it */
		call(SYS_kill, self, SIGTERM);
	else
		call(SYS_kill, -command, signal);
}

/* Take a piece of a frame's body; whether it made sense. */
static int take_piece(char letter, const byte *from, word size, word before, long command)
{
	if (letter == 'I') {
		if (input_from) { /* to the front, where there is room for what comes behind */
			memcpy(input, input + input_from, input_size);
			input_from = 0;
		}
		if (size > sizeof input - input_size)
			return 0;
		memcpy(input + input_size, from, size);
		input_size += size;
		return 1;
	}
	if (before + size > sizeof words)
		return 0;
	memcpy(words + before, from, size);
	if (before + size < sizeof words)
		return 1;
	unsigned number;
	memcpy(&number, words, sizeof number);
	if (letter == 'O')
		output_room += number;
	else if (letter == 'S' && command)
		signal_command(command, number);
	return letter == 'O' || letter == 'S';
}

/* Take what has come; whether it made sense. `command`: 0 when it has ended. */
static int take_frames(long command)
{
	static byte coming[AT_ONCE];
	static word of_frame;
	long size = call(SYS_read, port, coming, sizeof coming);
	for (long at = 0; at < size;) {
		if (head_size < HEAD) {
			head[head_size++] = coming[at++];
			if (head_size < HEAD)
				continue;
			unsigned count;
			memcpy(&count, head + 1, sizeof count);
			left_of_frame = of_frame = count;
			if (head[0] == 'C')
				input_ended = 1;
			if (!count)
				head_size = 0;
			continue;
		}
		word piece = (word)(size - at) < left_of_frame ? (word)(size - at) : left_of_frame;
		if (!take_piece(head[0], coming + at, piece, of_frame - left_of_frame, command))
			return 0;
		at += piece;
		left_of_frame -= piece;
		if (!left_of_frame)
			head_size = 0;
	}
	return 1;
}

/* Give the command what it takes of its input; where that goes, or -1 when it is closed. */
static long give_input(long to)
{
	while (input_size && to >= 0) {
		long done = call(SYS_write, to, input + input_from, input_size);
		if (done == -EAGAIN)
			return to;
		if (done == -EINTR)
			continue;
		if (done <= 0) { /* it has closed it: what comes is thrown away */
			close_file(to);
			to = -1;
			break;
		}
		input_from += done;
		input_size -= done;
		input_taken += done;
	}
	if (to < 0) {
		input_taken += input_size;
		input_size = 0;
	}
	if (!input_size)
		input_from = 0;
	if (!input_size && input_ended && to >= 0) {
		close_file(to);
		to = -1;
	}
	return to;
}

/* Pass on a piece of what was printed; from where, or -1 at its end. */
static long take_output(char letter, long from)
{
	word most = sizeof going - going_size - HEAD - SPARED;
	byte *at = going + going_size;
	if ((long)most > output_room)
		most = output_room;
	long size = call(SYS_read, from, at + HEAD, most);
	if (size <= 0) {
		if (size == -EINTR || size == -EAGAIN)
			return from;
		close_file(from);
		return -1;
	}
	unsigned count = size;
	at[0] = letter;
	memcpy(at + 1, &count, sizeof count);
	going_size += HEAD + size;
	output_room -= size;
	return from;
}

static int can_take_output(void)
{
	return output_room > 0 && going_size + HEAD + SPARED < sizeof going / 2;
}

/* Stay with the command, and between it and the port, until both are over. */
__attribute__((noreturn)) static void attend_by_port(struct care *care, long in, long out, long err)
{
	struct ending how;
	int has_ended = 0, has_said_all = 0;
	for (;;) {
		int takes = can_take_output();
		struct pollfd waits[] = {
			{ .fd = has_ended ? -1 : care->signals, .events = POLLIN },
			{ .fd = port, .events = POLLIN | (going_size ? POLLOUT : 0) },
			{ .fd = takes ? out : -1, .events = POLLIN },
			{ .fd = takes ? err : -1, .events = POLLIN },
			{ .fd = in, .events = input_size ? POLLOUT : 0 },
		};
		call(SYS_poll, waits, 5, has_ended ? -1 : until_due(care));
		int has_gone = waits[1].revents & (POLLERR | POLLHUP | POLLNVAL);
		if (!has_gone && waits[1].revents & POLLIN)
			has_gone = !take_frames(has_ended ? 0 : care->command);
		if (has_gone) { /* the command may have some seconds left, and finds its pipes closed */
			close_file(port);
			close_file(out);
			close_file(err);
			close_file(in);
			port = out = err = in = -1;
			input_size = going_size = going_from = 0;
		}
		if (waits[2].revents && out >= 0)
			out = take_output('O', out);
		if (waits[3].revents && err >= 0 && can_take_output())
			err = take_output('E', err);
		if (waits[4].revents & POLLERR && in >= 0) {
			close_file(in);
			in = -1;
		}
		in = give_input(in);
		if (!has_ended && look_after(care, has_gone, &how)) {
			has_ended = 1;
			if (port >= 0)
				say_end(care->request, &how);
		}
		if (port < 0) {
			if (has_ended)
				end(0);
			continue;
		}
		if (input_taken && going_size + 2 * HEAD < sizeof going - SPARED / 2) {
			put_frame('I', &input_taken, sizeof input_taken);
			input_taken = 0;
		}
		if (has_ended && out < 0 && err < 0 && !has_said_all) {
			has_said_all = 1;
			put_frame('Z', 0, 0);
		}
		write_frames(); /* whoever has gone is seen above */
	}
}

/* Serve one user of the port, which is free. */
__attribute__((noreturn)) static void serve_once(const char *path)
{
	static struct request request;
	static struct account account;
	static struct told told;
	int in[2], out[2], err[2];
	word usual[4] = { 0 };
	/* What a shell starts behind its back ignores some, and commands would do so too. */
	for (long each = 1; each <= 64; each++)
		call(SYS_rt_sigaction, each, usual, 0, sizeof(word));
	long null = open_file("/dev/null", O_RDWR, 0), random = open_file("/dev/urandom", O_WRONLY, 0);
	call(SYS_prctl, PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
	if (null < 0 || call(SYS_pipe2, in, O_CLOEXEC) || call(SYS_pipe2, out, O_CLOEXEC) ||
	    call(SYS_pipe2, err, O_CLOEXEC))
		end(1);
	call(SYS_fcntl, in[1], F_SETFL, O_WRONLY | O_NONBLOCK);
	long file;
	while ((file = open_file(path, O_RDWR, 0)) < 0) /* what is left of the last one is about to end */
		sleep_ms(20);
	if (write_all(file, GREETING, sizeof GREETING - 1))
		end(0);
	long greeted = now();
	if (read_exactly(file, &told, sizeof told) || !alike(told.magic, "SBXP", 4))
		end(0); /* the host has hung up */
	take_request(&request, file);
	long signals = watch_signals();
	port = file;
	call(SYS_fcntl, port, F_SETFL, O_RDWR | O_NONBLOCK);
	memcpy(going, request.token, TOKEN);
	going_size = TOKEN;
	if (told.time) {
		long clock = set_clock(told.time, now() - greeted > SURE_NS);
		say(&request, 'T', -clock, -reseed(random, told.seed, sizeof told.seed), 0, 0);
	}
	prepare(&request, &account);
	call(SYS_dup2, request.flags & WANTS_INPUT ? in[0] : null, 0);
	call(SYS_dup2, out[1], 1);
	call(SYS_dup2, err[1], 2);
	long started = now(), command = start(&request, &account);
	for (int each = 0; each < 3; each++)
		call(SYS_dup2, null, each);
	close_file(in[0]);
	close_file(out[1]);
	close_file(err[1]);
	if (command < 0)
		fail(&request, failed_at, command);
	say(&request, 'S', call(SYS_getpid), command, 0, 0);
	write_frames();
	struct care care = begin_care(&request, command, signals, started);
	attend_by_port(&care, in[1], out[0], err[0]);
}

/* Serve the port, one user after the other. */
__attribute__((noreturn)) static void serve_commands(const char *name)
{
	char path[320];
	long pause = 0;
	while (find_port(name, path, path + sizeof path))
		sleep_ms(100);
	for (;;) {
		int status = 0;
		long started = now(), child = call(SYS_fork);
		if (!child)
			serve_once(path);
		while (child > 0 && call(SYS_wait4, child, &status, 0, 0) == -EINTR)
			;
		int failed = child < 0 || (status && now() - started < 100000000);
		pause = failed ? (pause < 1000 ? pause * 2 + 20 : pause) : 0;
		if (pause)
			sleep_ms(pause);
	}
}
