/* The walls around a QEMU, built by the process that becomes it: for confine.c, and for the program
 * that libvirt runs. They are told by options, in the same words for both:
 *
 *	space=LETTERS	the namespaces: m(ount) p(id) n(et) i(pc) h(ost name) u(ser)
 *	tree=PATH	a file, folder or symbolic link that it finds there, to read and execute
 *	device=PATH	a device that it finds there, to read, write and control
 *	folder=FD:PATH	that descriptor is of that folder: QEMU reads it, and gets nothing above it
 *	folder=FD	the same, where its user may not enter what is above it
 *	file=FD		that descriptor is of a file that QEMU opens once more, to read
 *	opened=FD	that descriptor is of a device that QEMU opens once more, to read and write
 *	landlock=1	have Landlock keep it to these paths, too, as far as this kernel knows it
 *
 * What is asked for is done or nothing goes on: it says on standard error what failed, and exits
 * with 126. Whatever is not needed to run guests is refused by a seccomp filter, beside QEMU's own.
 */
#ifndef WALLS_H
#define WALLS_H
#include "guest/bare.h"
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stddef.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>

#define MOST 64 /* of each kind of option */
#define ROOM 4096
#define PLACE "/sys" /* where the new root is put together: there on every host, and not needed */

#define SYS_MOUNT_SETATTR 442
#define SYS_LANDLOCK_CREATE 444
#define SYS_LANDLOCK_ADD 445
#define SYS_LANDLOCK_RESTRICT 446

/* include/uapi/linux/mount.h and landlock.h, spelled out because headers may be older. */
struct attributes {
	unsigned long set, clear, propagation, userns;
};
#define ATTR_RDONLY 1UL
#define ATTR_NOSUID 2UL
#define ATTR_NODEV 4UL
#define ATTR_NOEXEC 8UL

struct ruleset {
	unsigned long files, net, scoped;
};
struct __attribute__((packed)) beneath {
	unsigned long allowed;
	int parent;
};
#define LL_EXECUTE (1UL << 0)
#define LL_WRITE (1UL << 1)
#define LL_READ (1UL << 2)
#define LL_READ_DIR (1UL << 3)
#define LL_IOCTL (1UL << 15)

static const char *trees[MOST], *devices[MOST], *folders[MOST];
static long files[MOST], opened_devices[MOST];
static int tree_count, device_count, folder_count, file_count, opened_count;
static long spaces, landlock;

__attribute__((noreturn)) static void fail(const char *what, const char *which, long error)
{
	char text[ROOM], *at = text, *limit = text + sizeof text;
	at = put(at, limit, "confine: ");
	at = put(at, limit, what);
	if (which) {
		at = put(at, limit, " ");
		at = put(at, limit, which);
	}
	at = put(at, limit, ": errno ");
	at = put_number(at, limit, -error);
	at = put(at, limit, "\n");
	write_all(2, text, at - text);
	end(126);
}

static void must(const char *what, const char *which, long result)
{
	if (result < 0)
		fail(what, which, result);
}

static long number_of(const char *option, const char *text)
{
	long number = take_number(&text);
	if (number < 0 || *text)
		fail("no number", option, -EINVAL);
	return number;
}

static void add(const char **list, int *count, const char *text)
{
	if (*count == MOST)
		fail("too many options", text, -E2BIG);
	list[(*count)++] = text;
}

static void add_number(long *list, int *count, const char *option, const char *text)
{
	if (*count == MOST)
		fail("too many options", option, -E2BIG);
	list[(*count)++] = number_of(option, text);
}

static long space_of(char letter)
{
	switch (letter) {
	case 'm':
		return CLONE_NEWNS;
	case 'p':
		return CLONE_NEWPID;
	case 'n':
		return CLONE_NEWNET;
	case 'i':
		return CLONE_NEWIPC;
	case 'h':
		return CLONE_NEWUTS;
	case 'u':
		return CLONE_NEWUSER;
	}
	fail("no such namespace", 0, -EINVAL);
}

static void take_wall(const char *option)
{
	if (begins(option, "space="))
		for (const char *at = option + 6; *at; at++)
			spaces |= space_of(*at);
	else if (begins(option, "tree="))
		add(trees, &tree_count, option + 5);
	else if (begins(option, "device="))
		add(devices, &device_count, option + 7);
	else if (begins(option, "folder="))
		add(folders, &folder_count, option + 7);
	else if (begins(option, "file="))
		add_number(files, &file_count, option, option + 5);
	else if (begins(option, "opened="))
		add_number(opened_devices, &opened_count, option, option + 7);
	else if (same(option, "landlock=1"))
		landlock = 1;
	else
		fail("no such option", option, -EINVAL);
}

static void write_file(const char *path, const char *text)
{
	long file = open_file(path, O_WRONLY, 0);
	must("open", path, file);
	must("write", path, write_all(file, text, length(text)));
	close_file(file);
}

/* One user and one group, who are who they were. */
static void map_user(long user, long group)
{
	char text[64], *limit = text + sizeof text, *at;
	write_file("/proc/self/setgroups", "deny");
	at = put(put_number(text, limit, user), limit, " ");
	put(put_number(at, limit, user), limit, " 1");
	write_file("/proc/self/uid_map", text);
	at = put(put_number(text, limit, group), limit, " ");
	put(put_number(at, limit, group), limit, " 1");
	write_file("/proc/self/gid_map", text);
}

static void set_attributes(const char *path, unsigned long set, int flags)
{
	struct attributes wanted = { .set = set };
	must("mount_setattr", path,
	     call(SYS_MOUNT_SETATTR, AT_FDCWD, path, flags, &wanted, sizeof wanted));
}

/* The path below `PLACE`, with all folders above it. */
static void place(char *to, const char *path)
{
	char *limit = to + ROOM, *last = put(to, limit, PLACE);
	if (length(path) + sizeof PLACE >= ROOM)
		fail("too long", path, -ENAMETOOLONG);
	put(last, limit, path);
	for (char *at = last + 1; *at; at++) {
		if (*at != '/')
			continue;
		*at = 0;
		long made = call(SYS_mkdir, to, 0755);
		if (made < 0 && made != -EEXIST)
			fail("mkdir", to, made);
		*at = '/';
	}
}

/* Have what lies at a path of the host at a path below `PLACE`. */
static void bind_path(const char *path, const char *at, unsigned long set)
{
	char target[ROOM], link[ROOM];
	struct stat status;
	place(target, at);
	must("lstat", path, call(SYS_lstat, path, &status));
	if (S_ISLNK(status.st_mode)) {
		long size = call(SYS_readlink, path, link, sizeof link - 1);
		must("readlink", path, size);
		link[size] = 0;
		must("symlink", target, call(SYS_symlink, link, target));
		return;
	}
	if (S_ISDIR(status.st_mode)) {
		long made = call(SYS_mkdir, target, 0755);
		if (made < 0 && made != -EEXIST)
			fail("mkdir", target, made);
	} else {
		long file = open_file(target, O_WRONLY | O_CREAT, 0444);
		must("create", target, file);
		close_file(file);
	}
	must("bind", path, call(SYS_mount, path, target, 0, MS_BIND | MS_REC, 0));
	set_attributes(target, set, AT_RECURSIVE);
}

/* 0: it has none. */
static const char *path_of(const char *folder, long *descriptor)
{
	*descriptor = take_number(&folder);
	if (*descriptor >= 0 && !*folder)
		return 0;
	if (*descriptor < 0 || *folder != ':' || folder[1] != '/')
		fail("no FD:PATH", folder, -EINVAL);
	return folder + 1;
}

static void name_folder(char *to, int number)
{
	put_number(put(to, to + 32, "/given"), to + 32, number);
}

/* What /proc shows: the processes of this namespace; where that is the host's, this one alone. */
static void place_proc(void)
{
	char self[32];
	if (!(spaces & CLONE_NEWPID)) {
		put_number(put(self, self + sizeof self, "/proc/"), self + sizeof self,
			   call(SYS_getpid));
		bind_path(self, "/proc/self", ATTR_NOSUID | ATTR_NODEV | ATTR_NOEXEC);
		return;
	}
	must("mkdir", PLACE "/proc", call(SYS_mkdir, PLACE "/proc", 0555));
	must("proc", 0,
	     call(SYS_mount, "proc", PLACE "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC,
		  "subset=pid"));
}

/* A root with nothing in it but what was asked for, and its own processes. */
static void change_root(void)
{
	char name[32];
	const char *path;
	long descriptor;
	must("private mounts", 0, call(SYS_mount, "none", "/", 0, MS_REC | MS_PRIVATE, 0));
	must("tmpfs", 0,
	     call(SYS_mount, "stratabox", PLACE, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC,
		  "mode=0755,size=256k,nr_inodes=256"));
	for (int number = 0; number < tree_count; number++)
		bind_path(trees[number], trees[number], ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV);
	for (int number = 0; number < device_count; number++)
		bind_path(devices[number], devices[number], ATTR_NOSUID);
	for (int number = 0; number < folder_count; number++) {
		name_folder(name, number);
		path = path_of(folders[number], &descriptor);
		if (path)
			bind_path(path, name, ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV);
	}
	place_proc();
	must("chdir", PLACE, call(SYS_chdir, PLACE));
	must("pivot_root", PLACE, call(SYS_pivot_root, ".", "."));
	must("unmount", 0, call(SYS_umount2, ".", MNT_DETACH));
	must("chdir", "/", call(SYS_chdir, "/"));
	set_attributes("/", ATTR_RDONLY, 0);
	for (int number = 0; number < folder_count; number++) {
		name_folder(name, number);
		if (!path_of(folders[number], &descriptor))
			continue;
		/* The one that it had leads out of here, by "..". */
		long opened = open_file(name, O_RDONLY | O_DIRECTORY, 0);
		must("open", name, opened);
		must("dup", name, call(SYS_dup3, opened, descriptor, 0));
		close_file(opened);
	}
}

static void allow(long rules, long file, unsigned long allowed, const char *which)
{
	struct beneath rule = { .allowed = allowed, .parent = file };
	must("landlock_add_rule", which, call(SYS_LANDLOCK_ADD, rules, 1, &rule, 0));
}

static void allow_path(long rules, const char *path, unsigned long allowed)
{
	struct stat status;
	long file = open_file(path, O_PATH, 0);
	must("open", path, file);
	must("fstat", path, call(SYS_fstat, file, &status));
	allow(rules, file, S_ISDIR(status.st_mode) ? allowed : allowed & ~LL_READ_DIR, path);
	close_file(file);
}

static void keep_to_paths(void)
{
	long version = call(SYS_LANDLOCK_CREATE, 0, 0, 1), descriptor;
	if (version < 1)
		return; /* a kernel without, or with it switched off */
	struct ruleset handled = { .files = (1UL << 13) - 1 };
	if (version >= 2)
		handled.files |= 1UL << 13;
	if (version >= 3)
		handled.files |= 1UL << 14;
	if (version >= 5)
		handled.files |= LL_IOCTL;
	if (version >= 4)
		handled.net = 3; /* TCP: neither bind nor connect */
	if (version >= 6)
		handled.scoped = 3; /* neither abstract sockets nor signals of others */
	word size = version >= 6 ? 24 : version >= 4 ? 16 : 8;
	long rules = call(SYS_LANDLOCK_CREATE, &handled, size, 0);
	must("landlock_create_ruleset", 0, rules);
	for (int number = 0; number < tree_count; number++)
		allow_path(rules, trees[number], LL_READ | LL_READ_DIR | LL_EXECUTE);
	for (int number = 0; number < device_count; number++)
		allow_path(rules, devices[number],
			   LL_READ | LL_WRITE | (handled.files & LL_IOCTL));
	for (int number = 0; number < folder_count; number++) {
		path_of(folders[number], &descriptor);
		allow(rules, descriptor, LL_READ | LL_READ_DIR, folders[number]);
	}
	for (int number = 0; number < file_count; number++)
		allow(rules, files[number], LL_READ | LL_EXECUTE, "file");
	for (int number = 0; number < opened_count; number++)
		allow(rules, opened_devices[number],
		      LL_READ | LL_WRITE | (handled.files & LL_IOCTL), "device");
	/* Without a pid namespace this is everybody's, as far as the user may look. */
	allow_path(rules, "/proc", LL_READ | LL_READ_DIR);
	must("landlock_restrict_self", 0, call(SYS_LANDLOCK_RESTRICT, rules, 0));
	close_file(rules);
}

/* What no QEMU of ours needs, and what it could do harm by. */
static const unsigned short refused[] = {
	SYS_unshare, SYS_setns, SYS_mount, SYS_umount2, SYS_pivot_root, SYS_chroot, SYS_ptrace,
	SYS_process_vm_readv, SYS_process_vm_writev, SYS_bpf, SYS_perf_event_open, SYS_keyctl,
	SYS_add_key, SYS_request_key, SYS_init_module, SYS_finit_module, SYS_delete_module,
	SYS_kexec_load, SYS_kexec_file_load, SYS_open_by_handle_at, SYS_name_to_handle_at,
	SYS_swapon, SYS_swapoff, SYS_reboot, SYS_acct, SYS_settimeofday, SYS_adjtimex,
	SYS_clock_settime, SYS_clock_adjtime, SYS_quotactl, SYS_personality, SYS_mknod,
	SYS_mknodat, SYS_iopl, SYS_ioperm, SYS_modify_ldt, SYS_syslog, SYS_vhangup,
	428 /* open_tree */, 429 /* move_mount */, 430 /* fsopen */, 431 /* fsconfig */,
	432 /* fsmount */, 433 /* fspick */, 442 /* mount_setattr */, 425 /* io_uring_setup */,
	426, 427, /* ... enter and register */
};
#define REFUSED (sizeof refused / sizeof *refused)
#define NAMESPACES                                                                                 \
	(CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWUSER | \
	 0x02000000 /* cgroup */)

static void filter(void)
{
	static struct sock_filter code[2 * REFUSED + 32];
	struct sock_filter *at = code;
	const struct sock_filter
		refuse = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
		absent = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS),
		kill = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
		load_number = BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		load_first = BPF_STMT(BPF_LD | BPF_W | BPF_ABS,
				      offsetof(struct seccomp_data, args[0]));
#define UNLESS(test, value, skipped)                                                               \
	((struct sock_filter)BPF_JUMP(BPF_JMP | BPF_K | (test), (value), 0, (skipped)))
	*at++ = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS,
					     offsetof(struct seccomp_data, arch));
	*at++ = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 1, 0);
	*at++ = kill;
	*at++ = load_number;
	*at++ = UNLESS(BPF_JGE, 0x40000000, 1); /* the other ABI's numbers */
	*at++ = kill;
	for (word number = 0; number < REFUSED; number++) {
		*at++ = UNLESS(BPF_JEQ, refused[number], 1);
		*at++ = refuse;
	}
	*at++ = UNLESS(BPF_JEQ, 435 /* clone3, whose flags cannot be seen */, 1);
	*at++ = absent;
	*at++ = UNLESS(BPF_JEQ, SYS_clone, 3);
	*at++ = load_first;
	*at++ = UNLESS(BPF_JSET, NAMESPACES, 1);
	*at++ = refuse;
	*at++ = load_number; /* what is in it now may be clone's flags */
	*at++ = UNLESS(BPF_JEQ, SYS_socket, 3);
	*at++ = load_first;
	*at++ = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 1 /* AF_UNIX */, 1, 0);
	*at++ = refuse;
	*at++ = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
	struct sock_fprog program = { .len = at - code, .filter = code };
	must("seccomp", 0, call(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program));
}


/* What can be done by the process itself, in the namespaces that it is in by now.
 * `user` and `group` are who it was before. */
static void change_places(long user, long group)
{
	if (spaces & CLONE_NEWUSER)
		map_user(user, group);
	if (spaces & CLONE_NEWNS) {
		/* QEMU's user enters what root makes here, whatever root's umask. */
		long mask = call(SYS_umask, 022);
		change_root();
		call(SYS_umask, mask);
	}
}

/* From here on it can become nothing but less. */
static void close_up(void)
{
	must("no_new_privs", 0, call(SYS_prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	if (landlock)
		keep_to_paths();
	filter();
}
#endif
