/* Commands that were left behind. Each has a keeper of its own, which belongs to no connection, and
 * a folder; all of it is in memory, and gone with a boot:
 *
 *     /run/stratabox/jobs/ID/state      struct state, mapped by all who look at it
 *                            request    what it was started with: user, folder, sandbox, job,
 *                                       arguments, a zero behind each; cut
 *                            ring       the last RING bytes that it has printed, in frames
 *
 *     keeper jobs list                  prints of each: id, struct state, size (u32), request
 *     keeper jobs follow ID OFFSET y|n  prints frames from there on; at the end, unless it is not to
 *                                       follow, how it ended
 *     keeper jobs signal ID NUMBER
 *
 * A frame is what was printed at once: stream (u8: 1, 2), 3 zeros, size (u32), offset behind it (u64),
 * bytes. Followers see as well: 3, a gap, whose size is in the offset's place; and 4, with the state.
 * Positions in the ring only grow; a frame may go over its end. The writer moves the tail before it
 * writes, so a follower that finds its frame still there after it was copied has it whole.
 */
#include <linux/futex.h>

#define JOBS "/run/stratabox/jobs"
#define RING (1 << 20)
#define FRAME 16384
#define MOST_JOBS 64
#define ID 16
#define REQUEST_KEPT 4096

struct frame {
	byte stream, zeros[3];
	unsigned size;
	word offset;
};

struct state {
	unsigned changes; /* a futex: grows with everything that is written */
	unsigned has_ended;
	word keeper, pid, started_at; /* ns since 1970 */
	word code, signal, flags, duration;
	word tail, head; /* positions in the ring */
	word kept_from, printed; /* offsets in the output */
};

static struct state *job;
static byte *ring;

static void barrier(void)
{
	__asm__ volatile("" : : : "memory"); /* x86 itself keeps the order of writes, and of reads */
}

static void copy_in(word at, const void *from, word size)
{
	word start = at % RING, first = size < RING - start ? size : RING - start;
	memcpy(ring + start, from, first);
	memcpy(ring, (const byte *)from + first, size - first);
}

static void copy_out(void *to, word at, word size)
{
	word start = at % RING, first = size < RING - start ? size : RING - start;
	memcpy(to, ring + start, first);
	memcpy((byte *)to + first, ring, size - first);
}

static void tell_followers(void)
{
	barrier();
	job->changes++;
	call(SYS_futex, &job->changes, FUTEX_WAKE, 1 << 30, 0, 0, 0);
}

static void keep(byte stream, const byte *from, word size)
{
	struct frame frame = { .stream = stream, .size = size, .offset = job->printed + size };
	word whole = sizeof frame + size;
	while (job->head + whole - job->tail > RING) {
		struct frame oldest;
		copy_out(&oldest, job->tail, sizeof oldest);
		job->kept_from = oldest.offset;
		job->tail += sizeof oldest + oldest.size;
		barrier();
	}
	copy_in(job->head, &frame, sizeof frame);
	copy_in(job->head + sizeof frame, from, size);
	barrier();
	job->head += whole;
	job->printed = frame.offset;
	tell_followers();
}

static void path_of(char *to, const char *limit, const char *id, const char *file)
{
	to = put(put(put(to, limit, JOBS "/"), limit, id), limit, *file ? "/" : "");
	put(to, limit, file);
}

static void *map_file(const char *path, word size, int writes)
{
	long file = open_file(path, writes ? O_RDWR | O_CREAT : O_RDWR, 0600);
	if (file < 0)
		return 0;
	if (writes)
		call(SYS_ftruncate, file, size);
	long at = call6(SYS_mmap, 0, size, 3, 1, file, 0); /* shared, to read and write */
	close_file(file);
	return at < 0 && at > -4096 ? 0 : (void *)at;
}

static void remove_job(const char *id)
{
	char path[128];
	static const char *const files[] = { "state", "ring", "request" };
	for (int at = 0; at < 3; at++) {
		path_of(path, path + sizeof path, id, files[at]);
		call(SYS_unlink, path);
	}
	path_of(path, path + sizeof path, id, "");
	call(SYS_rmdir, path);
}

/* Whether a keeper lives; another process can have its number by now. */
static int lives(word keeper)
{
	char path[64], name[32];
	char *to = put_number(put(path, path + sizeof path, "/proc/"), path + sizeof path, keeper);
	put(to, path + sizeof path, "/comm");
	return read_file(path, name, sizeof name) > 0 && begins(name, "keeper");
}

/* Look at one; one whose keeper was killed has ended, and nobody knows how. */
static int look_at(const char *id)
{
	char path[128];
	path_of(path, path + sizeof path, id, "state");
	job = map_file(path, sizeof *job, 0);
	if (job && !job->has_ended && job->keeper && !lives(job->keeper)) {
		job->signal = SIGKILL;
		job->flags |= WAS_KILLED;
		job->has_ended = 1;
		tell_followers();
	}
	return job != 0;
}

/* Call `act` for every job's id. */
static void for_each_job(void (*act)(const char *id, void *with), void *with)
{
	static char list[8192] __attribute__((aligned(8)));
	long folder = open_file(JOBS, O_RDONLY | O_DIRECTORY, 0), size;
	while ((size = call(SYS_getdents64, folder, list, sizeof list)) > 0)
		for (long next = 0; next < size;) {
			struct dirent64 *entry = (struct dirent64 *)(list + next);
			next += entry->d_reclen;
			if (length(entry->d_name) == ID)
				act(entry->d_name, with);
		}
	close_file(folder);
}

struct census {
	word count, oldest_at;
	char oldest[ID + 1];
};

static void count_job(const char *id, void *with)
{
	struct census *census = with;
	census->count++;
	if (!look_at(id))
		return;
	if (job->has_ended && (!census->oldest_at || job->started_at < census->oldest_at)) {
		census->oldest_at = job->started_at;
		put(census->oldest, census->oldest + sizeof census->oldest, id);
	}
	call(SYS_munmap, job, sizeof *job);
}

/* A place for one more, at the cost of the oldest that has ended. */
static long make_place(const char *id)
{
	char path[128];
	call(SYS_mkdir, JOBS, 0700);
	for (;;) {
		struct census census = { 0 };
		for_each_job(count_job, &census);
		if (census.count < MOST_JOBS)
			break;
		if (!census.oldest_at)
			return -EDQUOT;
		remove_job(census.oldest);
	}
	path_of(path, path + sizeof path, id, "");
	return call(SYS_mkdir, path, 0700);
}

static void write_request(const struct request *request)
{
	char path[128];
	path_of(path, path + sizeof path, request->job, "request");
	long file = open_file(path, O_WRONLY | O_CREAT, 0600);
	const char *heads[] = { request->user, request->folder, request->sandbox, request->job };
	word left = REQUEST_KEPT;
	for (word at = 0; at < 4 + request->argument_count && left; at++) {
		const char *text = at < 4 ? heads[at] : request->arguments[at - 4];
		word size = length(text) + 1 < left ? length(text) + 1 : left;
		write_all(file, text, size);
		left -= size;
	}
	close_file(file);
}

/* Take what there is to read; whether more may come. */
static int drain(long from, byte stream)
{
	static byte piece[FRAME];
	for (;;) {
		long size = call(SYS_read, from, piece, sizeof piece);
		if (size > 0)
			keep(stream, piece, size);
		else if (size != -EINTR)
			return size == -EAGAIN;
	}
}

/* The keeper of a command that was left behind: what that prints goes through here. */
__attribute__((noreturn)) static void attend_job(const struct request *request, long command,
						 long signals, long out, long err, long started)
{
	long deadline = request->timeout_ms ? started + (long)request->timeout_ms * 1000000 : 0;
	int open_out = 1, open_err = 1;
	for (;;) {
		struct pollfd waits[] = { { .fd = signals, .events = POLLIN },
					  { .fd = open_out ? out : -1, .events = POLLIN },
					  { .fd = open_err ? err : -1, .events = POLLIN } };
		long left = deadline && !job->has_ended ? (deadline - now() + 999999) / 1000000 : -1;
		if (deadline && !job->has_ended && left < 0)
			left = 0;
		call(SYS_poll, waits, 3, left > 1 << 30 ? 1 << 30 : left);
		struct signalfd_siginfo told;
		long flags = 0;
		int status = 0, ended = 0, other;
		while (call(SYS_read, signals, &told, sizeof told) > 0)
			flags |= told.ssi_signo == SIGTERM ? WAS_KILLED : 0;
		if (deadline && !job->has_ended && now() >= deadline)
			flags |= TIMED_OUT;
		if (waits[1].revents)
			open_out = drain(out, 1);
		if (waits[2].revents)
			open_err = drain(err, 2);
		for (long pid; (pid = call(SYS_wait4, -1, &other, WNOHANG, 0)) > 0;)
			if (pid == command) {
				status = other;
				ended = 1;
			}
		if (flags && !ended) {
			kill_all(command, &status);
			ended = !job->has_ended;
		}
		if (ended) { /* after all that it has printed */
			open_out = open_out && drain(out, 1);
			open_err = open_err && drain(err, 2);
			struct ending how = ending_of(request, status, flags, started);
			job->code = how.code;
			job->signal = how.signal;
			job->flags = how.flags;
			job->duration = how.duration;
			barrier();
			job->has_ended = 1;
			tell_followers();
		}
		/* What it has left behind may go on to print. */
		if (job->has_ended && !open_out && !open_err)
			end(0);
	}
}

static void see_to_job(struct request *request, struct account *account, long signals)
{
	char path[128];
	int out[2], err[2];
	if (length(request->job) != ID)
		fail(request, AT_REQUEST, -EINVAL);
	long error = make_place(request->job);
	if (error)
		fail(request, AT_JOB, error);
	path_of(path, path + sizeof path, request->job, "state");
	job = map_file(path, sizeof *job, 1);
	path_of(path, path + sizeof path, request->job, "ring");
	ring = map_file(path, RING, 1);
	error = job && ring ? call(SYS_pipe2, out, O_CLOEXEC) : -ENOMEM;
	if (!error)
		error = call(SYS_pipe2, err, O_CLOEXEC);
	if (error) {
		remove_job(request->job);
		fail(request, AT_JOB, error);
	}
	write_request(request);
	if (call(SYS_fork))
		end(0); /* the other one goes on, without the connection */
	call(SYS_setsid);
	call(SYS_prctl, PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
	long said = call(SYS_fcntl, 2, F_DUPFD_CLOEXEC, 10), null = open_file("/dev/null", O_RDWR, 0);
	call(SYS_dup2, null, 0);
	call(SYS_dup2, out[1], 1);
	call(SYS_dup2, err[1], 2);
	struct timespec time;
	call(SYS_clock_gettime, CLOCK_REALTIME, &time);
	job->started_at = time.tv_sec * 1000000000UL + time.tv_nsec;
	job->keeper = call(SYS_getpid);
	long started = now(), command = start(request, account);
	call(SYS_dup2, said, 2);
	call(SYS_dup2, null, 1);
	if (command < 0) {
		remove_job(request->job);
		fail(request, failed_at, command);
	}
	job->pid = command;
	say(request, 'S', job->keeper, command, 0, 0);
	call(SYS_dup2, null, 2);
	close_file(said);
	close_file(out[1]);
	close_file(err[1]);
	call(SYS_fcntl, out[0], F_SETFL, O_NONBLOCK);
	call(SYS_fcntl, err[0], F_SETFL, O_NONBLOCK);
	attend_job(request, command, signals, out[0], err[0], started);
}

/* For those who ask */

static void print_job(const char *id, void *with)
{
	static char text[REQUEST_KEPT + 1];
	char path[128];
	(void)with;
	if (!look_at(id))
		return;
	path_of(path, path + sizeof path, id, "request");
	long size = read_file(path, text, sizeof text);
	unsigned count = size < 0 ? 0 : size;
	write_all(1, id, ID);
	write_all(1, job, sizeof *job);
	write_all(1, &count, sizeof count);
	write_all(1, text, count);
	call(SYS_munmap, job, sizeof *job);
}

static void print_frame(byte stream, word offset, const void *from, word size)
{
	struct frame head = { .stream = stream, .size = size, .offset = offset };
	if (write_all(1, &head, sizeof head) || write_all(1, from, size))
		end(0); /* nobody listens any more */
}

__attribute__((noreturn)) static void follow(long offset, int to_its_end)
{
	static byte piece[FRAME];
	word at = job->tail, last = job->head;
	word wanted = offset < 0 ? ((word)-offset < job->printed ? job->printed + offset : 0) : (word)offset;
	word seen = wanted < job->printed ? wanted : job->printed;
	for (;;) {
		unsigned changes = job->changes, ended = job->has_ended;
		barrier();
		while (at < job->head && (to_its_end || at < last)) {
			struct frame frame;
			word size = 0;
			copy_out(&frame, at, sizeof frame);
			if (frame.size <= FRAME) {
				size = frame.size;
				copy_out(piece, at + sizeof frame, size);
			}
			barrier();
			if (job->tail > at) { /* it was overwritten meanwhile */
				at = job->tail;
				continue;
			}
			word begins_at = frame.offset - size;
			at += sizeof frame + size;
			if (frame.offset <= seen)
				continue;
			if (begins_at > seen)
				print_frame(3, begins_at - seen, 0, 0);
			word skipped = begins_at < seen ? seen - begins_at : 0;
			print_frame(frame.stream, frame.offset, piece + skipped, size - skipped);
			seen = frame.offset;
		}
		if (ended)
			print_frame(4, seen, job, sizeof *job);
		if (ended || !to_its_end)
			end(0);
		struct timespec moment = { 1, 0 };
		call(SYS_futex, &job->changes, FUTEX_WAIT, changes, &moment, 0, 0);
		struct pollfd listener = { .fd = 1 };
		call(SYS_poll, &listener, 1, 0);
		if (listener.revents & (POLLERR | POLLHUP))
			end(0);
		if (!job->has_ended && !lives(job->keeper)) {
			job->signal = SIGKILL;
			job->flags |= WAS_KILLED;
			job->has_ended = 1;
		}
	}
}

__attribute__((noreturn)) static void see_to_jobs(int count, char **arguments)
{
	char path[128];
	if (count == 1 && same(arguments[0], "list")) {
		for_each_job(print_job, 0);
		end(0);
	}
	if (count < 3 || length(arguments[1]) != ID || !look_at(arguments[1]))
		end(3);
	if (same(arguments[0], "follow") && count == 4) {
		int back = arguments[2][0] == '-';
		long offset = number_of(arguments[2] + back);
		path_of(path, path + sizeof path, arguments[1], "ring");
		ring = map_file(path, RING, 0);
		if (!ring)
			end(3);
		follow(back ? -offset : offset, arguments[3][0] == 'y');
	}
	if (same(arguments[0], "signal") && !job->has_ended) {
		long number = number_of(arguments[2]);
		if (number == SIGKILL)
			call(SYS_kill, job->keeper, SIGTERM);
		else if (number > 0)
			call(SYS_kill, -(long)job->pid, number);
	}
	end(0);
}
