/* Runs in a guest beside its sshd; the daemon puts it there (`channel_setup`), and nobody else calls
 * it.
 *
 *     keeper try                               nothing; so one sees that it can be run
 *     keeper channel FILE NAME NAME SSHD CONFIG [NAME]   serve those two ports (keeper_channel.h),
 *                                              and the last one (keeper_port.h)
 *     keeper run                               start a command and stay until it has ended; what it
 *                                              is to be comes on standard input (keeper_run.h)
 *     keeper jobs ...                          commands that were left behind (keeper_jobs.h)
 */
#include "bare.h"
#include "keeper_channel.h"
#include "keeper_run.h"
#include "keeper_jobs.h"
#include "keeper_port.h"

__attribute__((noreturn)) static void main_of(int count, char **arguments, char **environment)
{
	const char *what = count > 1 ? arguments[1] : "";
	if (same(what, "run"))
		run(environment);
	if (same(what, "jobs"))
		see_to_jobs(count - 2, arguments + 2);
	if (same(what, "channel") && (count == 7 || count == 8))
		serve(arguments[2], arguments[3], arguments[4], arguments[5], arguments[6],
		      count == 8 ? arguments[7] : 0);
	end(same(what, "try") ? 0 : 64);
}
