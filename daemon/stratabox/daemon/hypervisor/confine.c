/* Becomes QEMU, with as little of the host within reach as can be: started by `confinement` in
 * QEMU's place, it makes namespaces, leaves everything behind in them, and executes QEMU.
 *
 *	confine OPTION... -- PROGRAM ARGUMENT...
 *
 *	uid=N		become this user, and the group of the same number, without other groups
 *	group=N		but for this one (several times: these)
 *	report=FD	where the pid of the process that becomes QEMU is written, as decimal digits
 *
 * and the walls, as walls.h has them. The process that was started ends once the other has its pid,
 * whose parent is the same: in a pid namespace nobody can be but who is born there.
 */
#include "walls.h"

static long groups[MOST];
static int group_count;
static long uid = -1, report = -1;

static void take_option(const char *option)
{
	if (begins(option, "uid="))
		uid = number_of(option, option + 4);
	else if (begins(option, "group="))
		add_number(groups, &group_count, option, option + 6);
	else if (begins(option, "report="))
		report = number_of(option, option + 7);
	else
		take_wall(option);
}

static void become(void)
{
	unsigned int list[MOST];
	for (int number = 0; number < group_count; number++)
		list[number] = groups[number];
	must("setgroups", 0, call(SYS_setgroups, group_count, list));
	must("setresgid", 0, call(SYS_setresgid, uid, uid, uid));
	must("setresuid", 0, call(SYS_setresuid, uid, uid, uid));
}

__attribute__((noreturn)) static void main_of(int count, char **arguments, char **environment)
{
	int at = 1;
	for (; at < count && !same(arguments[at], "--"); at++)
		take_option(arguments[at]);
	char **program = arguments + at + 1;
	if (at + 1 >= count || report < 0)
		fail("usage: confine report=FD OPTION... -- PROGRAM ARGUMENT...", 0, -EINVAL);
	long user = call(SYS_getuid), group = call(SYS_getgid);
	long child = call(SYS_clone, spaces | CLONE_PARENT | SIGCHLD, 0);
	must("clone", 0, child);
	if (child) {
		char text[24];
		word size = put_number(text, text + sizeof text, child) - text;
		end(write_all(report, text, size) < 0 ? 126 : 0);
	}
	close_file(report);
	must("setsid", 0, call(SYS_setsid));
	change_places(user, group);
	if (uid >= 0)
		become();
	close_up();
	fail("execute", *program, call(SYS_execve, *program, program, environment));
}
