/* Stands in QEMU's place and tries what a guest that has taken over its QEMU would try. Prints a line
 * for each try: its name, and the errno that it ended with; 0: it succeeded.
 *
 *	escape FOLDER_FD FILE VICTIM_PID TCP_PORT ABSTRACT_NAME NEW SECRET...
 *
 * Asked for anything else, as when libvirt wants to know what its QEMU can do, it is QEMU.
 */
#include "guest/bare.h"
#include <sched.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>

static void told(const char *name, const char *which, long result)
{
	char text[4096], *limit = text + sizeof text, *at = put(text, limit, name);
	at = put(put(at, limit, which), limit, " ");
	at = put(put_number(at, limit, result < 0 ? -result : 0), limit, "\n");
	write_all(1, text, at - text);
}

static long read_one(long file)
{
	char text[1];
	long done = file < 0 ? file : call(SYS_read, file, text, 1);
	if (file >= 0)
		close_file(file);
	return done;
}

static long connected(int family, const void *address, word size)
{
	long made = call(SYS_socket, family, SOCK_STREAM, 0), result;
	if (made < 0)
		return made;
	result = call(SYS_connect, made, address, size);
	close_file(made);
	return result;
}

static void put_path(char *to, const char *first, const char *second, const char *third)
{
	char *limit = to + 512;
	put(put(put(to, limit, first), limit, second), limit, third);
}

__attribute__((noreturn)) static void main_of(int count, char **arguments, char **environment)
{
	const char *text = arguments[1];
	char path[512];
	long folder = take_number(&text);
	if (folder < 0)
		end(call(SYS_execve, QEMU, arguments, environment) < 0);
	/* What QEMU itself does. */
	put_path(path, "/proc/self/fd/", arguments[1], "/given");
	told("own-folder", "", read_one(open_file(path, O_RDONLY, 0)));
	put_path(path, "/proc/self/fd/", arguments[2], "");
	told("own-file", "", read_one(open_file(path, O_RDONLY, 0)));
	told("zeros", "", read_one(open_file("/dev/zero", O_RDONLY, 0)));
	/* What it must not. */
	for (int number = 7; number < count; number++)
		told("read:", arguments[number], read_one(open_file(arguments[number], O_RDONLY, 0)));
	told("read-above", "",
	     read_one(call(SYS_openat, folder, "../secret", O_RDONLY | O_CLOEXEC, 0)));
	told("list-root", "", open_file("/etc", O_RDONLY | O_DIRECTORY, 0));
	told("create", "", open_file(arguments[6], O_WRONLY | O_CREAT, 0600));
	text = arguments[3];
	long victim = take_number(&text);
	told("signal", "", call(SYS_kill, victim, 0));
	told("trace", "", call(SYS_ptrace, PTRACE_SEIZE, victim, 0, 0));
	put_path(path, "/proc/", arguments[3], "/environ");
	told("environment", "", read_one(open_file(path, O_RDONLY, 0)));
	put_path(path, "/proc/", arguments[3], "/cmdline");
	told("see", "", read_one(open_file(path, O_RDONLY, 0)));
	text = arguments[4];
	long port = take_number(&text);
	byte tcp[16] = { AF_INET, 0, port >> 8, port, 127, 0, 0, 1 };
	told("tcp", "", connected(AF_INET, tcp, sizeof tcp));
	byte name[110] = { AF_UNIX };
	put((char *)name + 3, (char *)name + sizeof name, arguments[5]);
	told("abstract", "", connected(AF_UNIX, name, 3 + length(arguments[5])));
	told("udp", "", call(SYS_socket, AF_INET, SOCK_DGRAM, 0));
	told("packets", "", call(SYS_socket, 17, SOCK_RAW, 0));
	told("mount", "", call(SYS_mount, "none", "/", "tmpfs", 0, 0));
	told("user-namespace", "", call(SYS_unshare, CLONE_NEWUSER));
	told("root", "", call(SYS_setuid, 0));
	told("io-uring", "", call(SYS_io_uring_setup, 1, path));
	told("by-handle", "", call(SYS_open_by_handle_at, folder, path, O_RDONLY));
	told("device", "", call(SYS_mknod, arguments[6], S_IFBLK | 0600, 0));
	end(0);
}
