/* Runs in a guest: tells what changes in a directory, by inotify, until its standard input ends.
 *
 *     watch FOLDER [-r | -f NAME]
 *
 * -r: with all directories in it, also those to come; -f: one entry of it alone. Without arguments it
 * does nothing, well. It removes its own file when it begins.
 *
 * What it tells are records: a letter for what happened, 'd' or 'f' for a directory or not, a path
 * that is relative to FOLDER, and a zero; for a move, the old path and a zero before that.
 *
 *     R ready   C created   W changed   D removed   M moved   O more has happened than can be told
 *
 * Directories are a tree of nodes with their names, so that one that moves is moved with all below.
 */
#include "bare.h"
#include <sys/inotify.h>

#define NODES 65536
#define NAMES (8 << 20)
#define ROOM (64 << 10)
#define DEPTH 256 /* of directories: each takes 16 KiB of stack, and a descriptor, while it is looked through */
#define PAIR_MS 50 /* for how long the second half of a move may be on its way */

#define INTEREST                                                                                   \
	(IN_CREATE | IN_MODIFY | IN_ATTRIB | IN_DELETE | IN_MOVED_FROM | IN_MOVED_TO |             \
	 IN_DELETE_SELF | IN_MOVE_SELF | IN_ONLYDIR | IN_EXCL_UNLINK)

struct node {
	int watch; /* 0: nothing is here */
	int parent;
	unsigned name; /* where in `names` */
};

static struct node nodes[NODES]; /* the first is FOLDER */
static int highest = 1, lowest_free = 1, newest_watch;
static char names[NAMES], spare[NAMES];
static unsigned named = 1;
static char *folder;
static char *only;
static int recursive, queue, overflown;

static char output[ROOM];
static word held;
static char last[2 * PATH_MAX + 4]; /* the record before, so that none comes twice in a row */
static word last_size;

static struct {
	int waiting, node, directory;
	unsigned cookie;
	char name[256];
} leaving;

static void flush(void)
{
	if (held && write_all(1, output, held))
		end(0); /* nobody listens any more */
	held = 0;
}

/* The path of an entry of a node, relative to FOLDER, with its zero; its size with that. 0: too long. */
static word path_of(int node, const char *name, char *to)
{
	char way[PATH_MAX];
	word at = sizeof way, size = length(name) + 1;
	if (size > sizeof way)
		return 0;
	at -= size;
	memcpy(way + at, name, size);
	for (int depth = 0; node; depth++, node = nodes[node].parent) {
		const char *part = names + nodes[node].name;
		word more = length(part);
		int slash = way[at] != 0;
		if (depth > DEPTH || more + slash > at)
			return 0;
		if (slash)
			way[--at] = '/';
		at -= more;
		memcpy(way + at, part, more);
	}
	memcpy(to, way + at, sizeof way - at);
	return sizeof way - at;
}

static void tell_record(const char *record, word size)
{
	if (size == last_size && alike(record, last, size) && record[0] == 'W')
		return;
	memcpy(last, record, size);
	last_size = size;
	if (held + size > sizeof output)
		flush();
	memcpy(output + held, record, size);
	held += size;
}

static void tell(char what, int directory, int node, const char *name)
{
	char record[PATH_MAX + 2] = { what, directory ? 'd' : 'f' };
	word size = path_of(node, name, record + 2);
	if (size)
		tell_record(record, size + 2);
}

static void tell_overflow(void)
{
	tell_record("Of", 3);
}

static void tell_move(int directory, int from, const char *old, int to, const char *name)
{
	char record[2 * PATH_MAX + 2] = { 'M', directory ? 'd' : 'f' };
	word one = path_of(from, old, record + 2);
	word other = one ? path_of(to, name, record + 2 + one) : 0;
	if (other)
		tell_record(record, 2 + one + other);
}

static int find_watch(int watch)
{
	for (int node = 0; node < highest; node++)
		if (nodes[node].watch == watch)
			return node;
	return -1;
}

static int find_child(int parent, const char *name)
{
	for (int node = 1; node < highest; node++)
		if (nodes[node].watch && nodes[node].parent == parent &&
		    same(names + nodes[node].name, name))
			return node;
	return -1;
}

/* Drop the names of what is gone. */
static void tidy(void)
{
	unsigned end = 1;
	for (int node = 1; node < highest; node++) {
		if (!nodes[node].watch)
			continue;
		word size = length(names + nodes[node].name) + 1;
		memcpy(spare + end, names + nodes[node].name, size);
		nodes[node].name = end;
		end += size;
	}
	memcpy(names, spare, end);
	named = end;
}

/* Where a name is kept; 0: there is no room. */
static unsigned keep_name(const char *name)
{
	word size = length(name) + 1;
	if (named + size > NAMES)
		tidy();
	if (named + size > NAMES)
		return 0;
	memcpy(names + named, name, size);
	named += size;
	return named - size;
}

/* Forget a directory and all below it; they may be watched again under another path. */
static void forget(int gone)
{
	if (nodes[gone].watch > 0)
		call(SYS_inotify_rm_watch, queue, nodes[gone].watch);
	nodes[gone].watch = 0;
	if (gone && gone < lowest_free)
		lowest_free = gone;
	for (int node = 1; node < highest; node++)
		if (nodes[node].watch && nodes[node].parent == gone)
			forget(node);
}

static long absolute(int node, const char *name, char *to)
{
	char rest[PATH_MAX];
	word size = path_of(node, name, rest), root = length(folder);
	if (!size || root + 1 + size > PATH_MAX)
		return -ENAMETOOLONG;
	memcpy(to, folder, root);
	to[root] = '/';
	memcpy(to + root + 1, rest, size);
	return 0;
}

static void scan(int node, int news, int depth);

/* Watch a directory that is an entry of one that is watched. `news`: tell of what is in it. */
static void enter(int parent, const char *name, int news, int depth)
{
	char path[PATH_MAX];
	if (!recursive)
		return;
	if (depth >= DEPTH || absolute(parent, name, path)) {
		overflown = 1;
		return;
	}
	if (news && find_child(parent, name) >= 0)
		return;
	int node = lowest_free;
	while (node < highest && nodes[node].watch)
		node++;
	unsigned kept = node < NODES ? keep_name(name) : 0;
	long watch = kept ? call(SYS_inotify_add_watch, queue, path, INTEREST | IN_DONT_FOLLOW)
			  : -ENOSPC;
	if (watch == -ENOSPC || watch == -ENOMEM) {
		overflown = 1;
		return;
	}
	if (watch < 0 || (watch <= newest_watch && find_watch(watch) >= 0))
		return; /* gone already, or not to be read; or the same directory, mounted twice */
	newest_watch = watch;
	nodes[node] = (struct node){ watch, parent, kept };
	lowest_free = node + 1;
	if (node == highest)
		highest++;
	scan(node, news, depth + 1);
}

static void scan(int node, int news, int depth)
{
	char path[PATH_MAX], buffer[4096];
	if (absolute(node, "", path))
		return;
	long directory = open_file(path, O_RDONLY | O_DIRECTORY | (node ? O_NOFOLLOW : 0), 0);
	if (directory < 0)
		return;
	for (;;) {
		long size = call(SYS_getdents64, directory, buffer, sizeof buffer);
		if (size <= 0)
			break;
		for (long at = 0; at < size;) {
			struct dirent64 *entry = (struct dirent64 *)(buffer + at);
			at += entry->d_reclen;
			if (same(entry->d_name, ".") || same(entry->d_name, ".."))
				continue;
			int is_directory = entry->d_type == DT_DIR;
			if (news)
				tell('C', is_directory, node, entry->d_name);
			if (is_directory || entry->d_type == DT_UNKNOWN)
				enter(node, entry->d_name, news, depth);
		}
	}
	close_file(directory);
}

/* What has left is not coming in elsewhere: it is gone. */
static void left(void)
{
	if (!leaving.waiting)
		return;
	leaving.waiting = 0;
	int node = find_child(leaving.node, leaving.name);
	if (node >= 0)
		forget(node);
	tell('D', leaving.directory, leaving.node, leaving.name);
}

static void arrived(int node, int directory, unsigned cookie, const char *name)
{
	if (!leaving.waiting || leaving.cookie != cookie) {
		left();
		tell('C', directory, node, name);
		if (directory)
			enter(node, name, 1, 0);
		return;
	}
	leaving.waiting = 0;
	int replaced = directory ? find_child(node, name) : -1;
	if (replaced >= 0)
		forget(replaced);
	tell_move(directory, leaving.node, leaving.name, node, name);
	int moved = find_child(leaving.node, leaving.name);
	if (moved < 0)
		return;
	unsigned kept = keep_name(name);
	if (!kept) {
		overflown = 1;
		forget(moved);
		return;
	}
	nodes[moved].parent = node;
	nodes[moved].name = kept;
}

static void happened(struct inotify_event *event)
{
	if (event->mask & IN_Q_OVERFLOW) {
		tell_overflow();
		return;
	}
	int node = find_watch(event->wd);
	if (node < 0)
		return;
	if (event->mask & (IN_DELETE_SELF | IN_MOVE_SELF | IN_UNMOUNT)) {
		if (node)
			return; /* its parent tells */
		left();
		tell('D', 1, 0, "");
		flush();
		end(0);
	}
	if (event->mask & IN_IGNORED) {
		if (node)
			forget(node);
		return;
	}
	int directory = !!(event->mask & IN_ISDIR);
	const char *name = event->len ? event->name : "";
	if (only && !same(name, only))
		return;
	if (event->mask & IN_MOVED_FROM) {
		left();
		if (only) {
			tell('D', directory, node, name);
			return;
		}
		leaving.waiting = 1;
		leaving.node = node;
		leaving.directory = directory;
		leaving.cookie = event->cookie;
		put(leaving.name, leaving.name + sizeof leaving.name, name);
	} else if (event->mask & IN_MOVED_TO) {
		arrived(node, directory, event->cookie, name);
	} else if (event->mask & IN_CREATE) {
		if (directory && find_child(node, name) >= 0)
			return; /* told of when the directory above was looked through */
		tell('C', directory, node, name);
		if (directory)
			enter(node, name, 1, 0);
	} else if (event->mask & IN_DELETE) {
		int child = directory ? find_child(node, name) : -1;
		if (child >= 0)
			forget(child);
		tell('D', directory, node, name);
	} else if (event->mask & (IN_MODIFY | IN_ATTRIB)) {
		tell('W', directory, node, name);
	}
}

__attribute__((noreturn)) static void refuse(long error)
{
	const char *why = error == -ENOENT    ? "No such file or directory\n"
			  : error == -ENOTDIR ? "Not a directory\n"
			  : error == -EACCES  ? "Permission denied\n"
					      : "";
	write_all(2, "watch: ", 7);
	write_all(2, why, length(why));
	end(*why ? 1 : 126); /* 126: inotify is not to be had */
}

static void follow(void)
{
	static char buffer[ROOM] __attribute__((aligned(8)));
	struct pollfd ends[2] = { { .fd = queue, .events = POLLIN }, { .fd = 0, .events = POLLIN } };
	for (;;) {
		if (overflown) {
			tell_overflow();
			overflown = 0;
		}
		flush();
		long ready = call(SYS_poll, ends, 2, leaving.waiting ? PAIR_MS : -1);
		if (!ready)
			left();
		if (ends[1].revents) {
			char nothing[512];
			if (call(SYS_read, 0, nothing, sizeof nothing) <= 0)
				end(0);
		}
		if (!(ends[0].revents & POLLIN))
			continue;
		long size = call(SYS_read, queue, buffer, sizeof buffer);
		for (long at = 0; at < size;) {
			struct inotify_event *event = (struct inotify_event *)(buffer + at);
			at += sizeof *event + event->len;
			happened(event);
		}
	}
}

__attribute__((noreturn)) static void main_of(int count, char **arguments, char **environment)
{
	(void)environment;
	if (count < 2)
		end(0);
	call(SYS_unlink, arguments[0]);
	folder = same(arguments[1], "/") ? "" : arguments[1];
	recursive = count == 3 && same(arguments[2], "-r");
	only = count == 4 && same(arguments[2], "-f") ? arguments[3] : 0;
	queue = call(SYS_inotify_init1, IN_CLOEXEC | IN_NONBLOCK);
	if (queue < 0)
		refuse(queue);
	nodes[0].watch = call(SYS_inotify_add_watch, queue, *folder ? folder : "/", INTEREST);
	if (nodes[0].watch < 0)
		refuse(nodes[0].watch);
	if (recursive)
		scan(0, 0, 0);
	char ready[] = "Rf";
	tell_record(ready, sizeof ready);
	follow();
	end(0);
}
