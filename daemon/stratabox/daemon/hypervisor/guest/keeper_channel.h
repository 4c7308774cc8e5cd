/* The port of the channel: one "sshd -i" after the other, each on a port that was opened anew. What
 * the host had sent to the last one is forgotten so. sshd waits in its first write until the host
 * connects, with all its loading done. */

static long find_port(const char *name, char *path, const char *limit)
{
	static char list[4096] __attribute__((aligned(8)));
	char at[320], found[128];
	long folder = open_file("/sys/class/virtio-ports", O_RDONLY | O_DIRECTORY, 0), size;
	if (folder < 0)
		return folder;
	while ((size = call(SYS_getdents64, folder, list, sizeof list)) > 0)
		for (long next = 0; next < size;) {
			struct dirent64 *entry = (struct dirent64 *)(list + next);
			next += entry->d_reclen;
			if (entry->d_name[0] == '.')
				continue;
			char *text = put(at, at + sizeof at, "/sys/class/virtio-ports/");
			put(put(text, at + sizeof at, entry->d_name), at + sizeof at, "/name");
			long count = read_file(at, found, sizeof found);
			if (count > 0 && found[count - 1] == '\n')
				found[count - 1] = 0;
			if (count <= 0 || !same(found, name))
				continue;
			put(put(path, limit, "/dev/"), limit, entry->d_name);
			close_file(folder);
			return 0;
		}
	close_file(folder);
	return size < 0 ? size : -ENOENT;
}

static void serve_commands(const char *name) __attribute__((noreturn));

static void write_pid(const char *path)
{
	char text[32];
	put(put_number(text, text + sizeof text, call(SYS_getpid)), text + sizeof text, "\n");
	long file = open_file(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
	write_all(file, text, length(text));
	close_file(file);
}

#define LATER 2000 /* ms */

/* Serve one port. `alive`: whether an sshd is there, of this port and of the other. */
__attribute__((noreturn)) static void serve_port(const char *name, char *sshd, char *config,
						 volatile int *alive, volatile int *other_alive)
{
	char path[320];
	char *arguments[] = { sshd, "-i", "-f", config, 0 };
	/* For each terminal libaudit asks a name server who "UNKNOWN" is, which is what sshd takes a
	 * port's other end for: 6 s where none answers. Names in /etc/hosts are still found. */
	char *environment[] = { "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
				"RES_OPTIONS=attempts:0",
				"LD_PRELOAD=/run/stratabox/onepoll", 0 }; /* onepoll.c */
	long pause = 0;
	while (find_port(name, path, path + sizeof path))
		sleep_ms(100);
	for (;;) {
		long port = open_file(path, O_RDWR, 0);
		if (port < 0) { /* -EBUSY: what is left of the last one is about to end */
			sleep_ms(20);
			continue;
		}
		int status = 0;
		long started = now(), child = call(SYS_fork);
		if (!child) {
			long null = open_file("/dev/null", O_RDWR, 0);
			call(SYS_dup2, null, 2);
			call(SYS_dup2, port, 0);
			call(SYS_dup2, port, 1);
			call(SYS_execve, sshd, arguments, environment);
			end(127);
		}
		close_file(port);
		*alive = child > 0;
		while (child > 0 && call(SYS_wait4, child, &status, 0, 0) == -EINTR)
			;
		*alive = 0;
		/* One that fails at once would take all of the CPU. */
		int failed = child < 0 || (status && now() - started < 100000000);
		pause = failed ? (pause < 1000 ? pause * 2 + 20 : pause) : 0;
		if (pause)
			sleep_ms(pause);
		else if (*other_alive) /* which is asked now, and wants the CPU */
			sleep_ms(LATER);
	}
}

/* `commands`: name of the port that commands go by without an sshd (keeper_port.h), or none. */
__attribute__((noreturn)) static void serve(const char *file, const char *first, const char *second,
					    char *sshd, char *config, const char *commands)
{
	/* anonymous and shared, to read and write */
	volatile int *alive = (volatile int *)call(SYS_mmap, 0, 4096, 3, 0x21, -1, 0);
	call(SYS_setsid);
	write_pid(file);
	if (commands && !call(SYS_fork))
		serve_commands(commands);
	if (call(SYS_fork))
		serve_port(first, sshd, config, alive, alive + 1);
	serve_port(second, sshd, config, alive + 1, alive);
}
