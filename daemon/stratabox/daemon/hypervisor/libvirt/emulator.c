/* What libvirt runs in QEMU's place: it fetches the command line and the files of one of
 * Stratabox's domains from the daemon, and becomes QEMU with them.
 *
 * libvirt is told in its XML how large a domain is and what it is called. All else (the hardware,
 * and files as descriptors that QEMU could not open by name) the daemon gives by a socket:
 *
 *     emulator ... -chardev socket,id=charmonitor,... -mon chardev=charmonitor,...
 *              ... -stratabox NAME UID
 *
 * connects to the socket NAME in the folder of this program, where UID must listen, and reads
 *
 *     magic, descriptors, walls, arguments, variables, bytes      6 little-endian 32-bit numbers
 *     `bytes` bytes: the walls, then the arguments, then the variables, each ended by a zero
 *     the descriptors by SCM_RIGHTS, with one byte for each message
 *
 * Descriptor number i becomes FIRST + i; the last one becomes standard output and error instead.
 * The walls are options of walls.h: it tries which of them can be had here, in a child, and sends
 * back a line:
 *
 *     full | paths WHY | plain WHY | off
 *
 * that is all of them, those that take no namespaces, the filter alone, or none because none were
 * asked for. Once the daemon has answered with a byte it builds just those, and executes QEMU with
 * these arguments and, behind them, libvirt's own monitor. Without "-stratabox", as when libvirt asks what QEMU can do, this is QEMU from the start.
 *
 * QEMU itself is "qemu" in the folder of this program.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#ifdef __x86_64__
#define WITH_LIBC
#include "../walls.h"
#define HAS_WALLS 1
#else
#define HAS_WALLS 0
#endif

enum {
    MAGIC = 0x32786273, /* "sbx2" */
    LINE = 1024,
    FIRST = 512,
    MOST_DESCRIPTORS = 16384,
    MOST_STRINGS = 65536,
    MOST_BYTES = 64 << 20,
    IN_ONE_MESSAGE = 200, /* the kernel's limit is 253 */
    OPEN_FILES = 65536,
    SECONDS = 60,
};

static const char MONITOR_CHARDEV[] = "socket,id=charmonitor,";
static const char MONITOR[] = "chardev=charmonitor,";

static void die(const char *format, ...)
{
    va_list values;

    fputs("stratabox: ", stderr);
    va_start(values, format);
    vfprintf(stderr, format, values);
    va_end(values);
    fputc('\n', stderr);
    exit(1);
}

/* A file in the folder of this program. */
static const char *beside(const char *name)
{
    static char path[PATH_MAX];
    ssize_t length = readlink("/proc/self/exe", path, sizeof path - 1);

    if (length <= 0 || (size_t)length + strlen(name) >= sizeof path)
        die("it does not find itself");
    path[length] = 0;
    strcpy(strrchr(path, '/') + 1, name);
    return path;
}

static const char *qemu(void)
{
    static char path[PATH_MAX];

    if (realpath(beside("qemu"), path) == NULL)
        die("%s: %s", beside("qemu"), strerror(errno));
    return path;
}

static int connected(const char *name, uid_t owner)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct timeval patience = {.tv_sec = SECONDS};
    struct ucred peer;
    socklen_t size = sizeof peer;
    int sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    /* From within the folder: its path may be longer than an address. */
    if (sock < 0 || strlen(name) >= sizeof address.sun_path || strchr(name, '/') ||
        chdir(beside("")) != 0)
        die("no socket");
    strcpy(address.sun_path, name);
    setsockopt(sock, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    setsockopt(sock, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    if (connect(sock, (struct sockaddr *)&address, sizeof address) != 0)
        die("the daemon that asked for this domain does not wait for it any more: %s",
            strerror(errno));
    if (chdir("/") != 0)
        die("no root folder");
    if (getsockopt(sock, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0 || peer.uid != owner)
        die("the socket is not the daemon's");
    return sock;
}

static void take(int sock, void *buffer, size_t size)
{
    for (size_t had = 0; had < size;) {
        ssize_t got = recv(sock, (char *)buffer + had, size - had, 0);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            die("the daemon went away: %s", got ? strerror(errno) : "end of file");
        had += (size_t)got;
    }
}

/* Those of one message; returns how many. */
static size_t take_descriptors(int sock, int *descriptors)
{
    char byte;
    union {
        char space[CMSG_SPACE(IN_ONE_MESSAGE * sizeof(int))];
        struct cmsghdr aligned;
    } control;
    struct iovec data = {.iov_base = &byte, .iov_len = 1};
    struct msghdr message = {
        .msg_iov = &data,
        .msg_iovlen = 1,
        .msg_control = control.space,
        .msg_controllen = sizeof control.space,
    };
    ssize_t got;

    do
        got = recvmsg(sock, &message, MSG_CMSG_CLOEXEC);
    while (got < 0 && errno == EINTR);
    struct cmsghdr *rights = got == 1 ? CMSG_FIRSTHDR(&message) : NULL;
    if (rights == NULL || rights->cmsg_type != SCM_RIGHTS || message.msg_flags & MSG_CTRUNC)
        die("the daemon's files did not arrive: %s", got < 0 ? strerror(errno) : "too many open?");
    size_t count = (rights->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    memcpy(descriptors, CMSG_DATA(rights), count * sizeof(int));
    return count;
}

static void have_at(int descriptor, int number)
{
    if (descriptor >= FIRST)
        die("too many files are open");
    if (number >= FIRST && fcntl(number, F_GETFD) != -1)
        die("descriptor %d is taken", number);
    if (dup2(descriptor, number) < 0)
        die("descriptor %d cannot be had: %s", number, strerror(errno));
}

/* Files that may be open: as many as the host allows, up to what Stratabox wants. No core dumps. */
static void set_limits(void)
{
    struct rlimit none = {0, 0}, files;

    setrlimit(RLIMIT_CORE, &none);
    if (getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_cur < OPEN_FILES) {
        files.rlim_cur = files.rlim_max < OPEN_FILES ? files.rlim_max : OPEN_FILES;
        setrlimit(RLIMIT_NOFILE, &files);
    }
}

/* libvirt's option whose value begins like that: both, at the end of the arguments. */
static char **append(char **end, int count, char **words, const char *option, const char *value)
{
    for (int each = 1; each + 1 < count; each++)
        if (!strcmp(words[each], option) && !strncmp(words[each + 1], value, strlen(value))) {
            *end++ = words[each];
            *end++ = words[each + 1];
            return end;
        }
    die("libvirt has no monitor (%s %s...)", option, value);
    return NULL;
}

#if HAS_WALLS
static void build_walls(void)
{
    long user = call(SYS_getuid), group = call(SYS_getgid);

    /* No pid namespace: that takes another process, and libvirt goes by this one's number. */
    if (spaces)
        must("unshare", NULL, call(SYS_unshare, spaces));
    change_places(user, group);
    close_up();
}

/* Whether they can be had, tried by a child. What it says, if not, is put in front of `why`. */
static int can_build_walls(char *why)
{
    int ends[2], status = -1;
    char said[LINE / 4], before[LINE];
    size_t had = 0;
    ssize_t got;

    if (pipe2(ends, O_CLOEXEC) != 0)
        die("no pipe: %s", strerror(errno));
    pid_t child = fork();
    if (child < 0)
        die("no process: %s", strerror(errno));
    if (child == 0) {
        dup2(ends[1], STDERR_FILENO);
        build_walls();
        end(0);
    }
    close(ends[1]);
    while ((got = read(ends[0], said + had, sizeof said - 1 - had)) > 0)
        had += (size_t)got;
    close(ends[0]);
    waitpid(child, &status, 0);
    if (status == 0)
        return 1;
    said[had] = 0;
    said[strcspn(said, "\n")] = 0;
    strcpy(before, why);
    snprintf(why, LINE / 2, "%s%s%.200s", had ? said : "it was ended", *before ? "; " : "", before);
    return 0;
}
#endif

/* Have the walls that can be had here; returns once they stand, if the daemon agrees to them. */
static void enclose(int sock, uint32_t count, char **options)
{
    char line[LINE], why[LINE / 2] = "", answer;
    const char *found = "off";

#if HAS_WALLS
    if (count) {
        for (uint32_t each = 0; each < count; each++)
            take_wall(options[each]);
        found = "full";
        if (!can_build_walls(why)) {
            found = "paths";
            spaces = 0;
            if (!can_build_walls(why)) {
                found = "plain";
                landlock = 0;
            }
        }
    }
#else
    (void)options;
    if (count) {
        found = "plain";
        strcpy(why, "they are built on x86-64");
    }
#endif
    int size = snprintf(line, sizeof line, "%s%s%s\n", found, *why ? " " : "", why);
    if (send(sock, line, (size_t)size, MSG_NOSIGNAL) != size)
        die("the daemon went away");
    if (recv(sock, &answer, 1, 0) != 1)
        die("the daemon does not start it within these walls: %s", line);
#if HAS_WALLS
    if (count)
        build_walls();
#endif
}

static void become_guest(int count, char **words, const char *name, const char *owner)
{
    uint32_t head[6];
    int sock = connected(name, (uid_t)strtoul(owner, NULL, 10));

    set_limits();
    take(sock, head, sizeof head);
    uint32_t descriptors = head[1], walls = head[2], arguments = head[3], variables = head[4];
    uint32_t bytes = head[5];
    if (head[0] != MAGIC || !descriptors || descriptors > MOST_DESCRIPTORS ||
        walls > MOST_STRINGS || arguments > MOST_STRINGS || variables > MOST_STRINGS || bytes > MOST_BYTES)
        die("the daemon is of another version");
    char *text = malloc(bytes + 1);
    char **argv = calloc(1 + arguments + 4 + 1, sizeof *argv);
    char **envp = calloc(variables + 1, sizeof *envp);
    char **options = calloc(walls + 1, sizeof *options);
    if (!text || !argv || !envp || !options)
        die("no memory");
    take(sock, text, bytes);
    text[bytes] = 0;

    char *next = text, **last = argv;
    *last++ = (char *)qemu();
    for (uint32_t each = 0; each < walls + arguments + variables; each++) {
        if (next >= text + bytes)
            die("the daemon's words are cut short");
        if (each < walls)
            options[each] = next;
        else if (each < walls + arguments)
            *last++ = next;
        else
            envp[each - walls - arguments] = next;
        next += strlen(next) + 1;
    }
    last = append(last, count, words, "-chardev", MONITOR_CHARDEV);
    append(last, count, words, "-mon", MONITOR);

    for (uint32_t had = 0; had < descriptors;) {
        int received[IN_ONE_MESSAGE];
        size_t some = take_descriptors(sock, received);
        if (!some || some > descriptors - had)
            die("the daemon's files are not as many as it says");
        for (size_t each = 0; each < some; each++, had++) {
            if (had + 1 < descriptors)
                have_at(received[each], FIRST + (int)had);
            else {
                have_at(received[each], STDOUT_FILENO);
                have_at(received[each], STDERR_FILENO);
            }
            close(received[each]);
        }
    }
    enclose(sock, walls, options);
    execve(argv[0], argv, envp);
    die("%s cannot be executed: %s", argv[0], strerror(errno));
}

int main(int count, char **words)
{
    for (int each = 1; each + 2 < count; each++)
        if (!strcmp(words[each], "-stratabox"))
            become_guest(count, words, words[each + 1], words[each + 2]);
    execv(qemu(), words);
    die("%s cannot be executed: %s", qemu(), strerror(errno));
}
