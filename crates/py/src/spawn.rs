//! How a service's process is started: everything that has to happen between clone() and execve(), and nothing else.
//!
//! The child borrows our memory until it executes its program (CLONE_VM, CLONE_VFORK: what posix_spawn() does), so that
//! a start costs the same whatever the size of the caller; it makes system calls alone and allocates nothing. Decides
//! the order of the steps. Which user, limits or folder is `fourtuple.launcher`'s; nothing here is waited for.

use std::ffi::{CString, c_char, c_int, c_long, c_ulong, c_void};
use std::io;
use std::ptr;

use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;

/// More than the child's deepest frame by far; it calls only the C library's thinnest functions.
const STACK_BYTES: usize = 64 << 10;
/// Where the child writes its own number (LISTEN_PID of sd_listen_fds(3) names the process that is started).
const LISTEN_PID: &[u8] = b"LISTEN_PID=";
const PID_DIGITS: usize = 10;
const NOT_EXECUTED: c_int = 127;
const NONE: c_ulong = 0;

/// `fourtuple.launcher.spawn.Birth`.
#[derive(FromPyObject)]
pub(crate) struct Birth {
    program: String,
    argv: Vec<String>,
    environment: Vec<String>,
    directory: String,
    descriptors: Vec<c_int>,
    user: Option<u32>,
    group: Option<u32>,
    groups: Vec<u32>,
    umask: u32,
    limits: Vec<(u32, u64, u64)>,
    nice: Option<i32>,
    cgroup: Option<c_int>,
    session: bool,
    no_new_privileges: bool,
    die_with_parent: bool,
    private_network: bool,
    private_tmp: bool,
    read_only: bool,
    writable: Vec<String>,
}

/// What the child reads, made before it exists, and where it says what went wrong.
struct Plan {
    program: CString,
    argv: Vec<*const c_char>,
    environment: Vec<*const c_char>,
    directory: CString,
    listen_pid: *mut u8,
    descriptors: Vec<c_int>,
    moved: Vec<c_int>,
    user: Option<u32>,
    group: Option<u32>,
    groups: Vec<u32>,
    umask: u32,
    limits: Vec<(u32, libc::rlimit)>,
    nice: Option<i32>,
    cgroup: Option<c_int>,
    session: bool,
    no_new_privileges: bool,
    die_with_parent: bool,
    namespaces: c_int,
    private_tmp: bool,
    read_only: bool,
    writable: Vec<CString>,
    parent: libc::pid_t,
    step: Step,
    errno: c_int,
}

// SAFETY: what the pointers lead to is kept by `spawn`, which waits, and is not bound to a thread.
unsafe impl Send for Plan {}

/// A step of the child that can fail, in words that follow "cannot".
#[derive(Clone, Copy)]
enum Step {
    Cgroup,
    Session,
    Descriptors,
    Limits,
    Nice,
    Namespaces,
    Mounts,
    User,
    Directory,
    Privileges,
    Parent,
    Execute,
}

impl Step {
    const fn words(self) -> &'static str {
        match self {
            Step::Cgroup => "join its cgroup",
            Step::Session => "be apart from its parent's processes",
            Step::Descriptors => "place its descriptors",
            Step::Limits => "set a limit",
            Step::Nice => "set its niceness",
            Step::Namespaces => "have namespaces of its own",
            Step::Mounts => "change its view of the files",
            Step::User => "become its user",
            Step::Directory => "change to its folder",
            Step::Privileges => "forgo new privileges",
            Step::Parent => "be bound to its parent",
            Step::Execute => "execute its program",
        }
    }
}

/// Start a process; gives its id and a pidfd. OSError says what it could not do: its number, and the step as its text.
///
/// The thread that calls this is the one whose end the child shares, if it is to die with its parent.
#[pyfunction]
pub(crate) fn spawn(py: Python<'_>, birth: Birth) -> PyResult<(libc::pid_t, c_int)> {
    let text = |text: String| CString::new(text).map_err(|_| PyValueError::new_err("a NUL in an argument"));
    let texts = |list: Vec<String>| list.into_iter().map(text).collect::<PyResult<Vec<_>>>();
    let argv = texts(birth.argv)?;
    let mut environment: Vec<Vec<u8>> =
        texts(birth.environment)?.into_iter().map(CString::into_bytes_with_nul).collect();
    let listen_pid = environment
        .iter_mut()
        .find(|entry| entry.starts_with(LISTEN_PID) && entry.len() > LISTEN_PID.len() + PID_DIGITS)
        .map_or(ptr::null_mut(), |entry| entry[LISTEN_PID.len()..].as_mut_ptr());
    let limit = |(resource, soft, hard)| (resource, libc::rlimit { rlim_cur: soft, rlim_max: hard });
    let pointers = |list: &mut dyn Iterator<Item = *const c_char>| list.chain([ptr::null()]).collect::<Vec<_>>();
    let mut plan = Plan {
        program: text(birth.program)?,
        argv: pointers(&mut argv.iter().map(|one| one.as_ptr())),
        environment: pointers(&mut environment.iter().map(|one| one.as_ptr().cast())),
        directory: text(birth.directory)?,
        listen_pid,
        moved: birth.descriptors.clone(),
        descriptors: birth.descriptors,
        user: birth.user,
        group: birth.group,
        groups: birth.groups,
        umask: birth.umask,
        limits: birth.limits.into_iter().map(limit).collect(),
        nice: birth.nice,
        cgroup: birth.cgroup,
        session: birth.session,
        no_new_privileges: birth.no_new_privileges,
        die_with_parent: birth.die_with_parent,
        namespaces: if birth.private_network { libc::CLONE_NEWNET } else { 0 }
            | if birth.private_tmp || birth.read_only { libc::CLONE_NEWNS } else { 0 },
        private_tmp: birth.private_tmp,
        read_only: birth.read_only,
        writable: texts(birth.writable)?,
        // SAFETY: it only answers.
        parent: unsafe { libc::getpid() },
        step: Step::Execute,
        errno: 0,
    };
    let (pid, pidfd) = py.detach(|| cloned(&mut plan)).map_err(|error| raised(py, &error, "be made: clone()"))?;
    if plan.errno == 0 {
        return Ok((pid, pidfd));
    }
    // SAFETY: our own child, which has ended, and a descriptor that nobody else knows.
    unsafe {
        while libc::waitpid(pid, ptr::null_mut(), 0) < 0 && errno() == libc::EINTR {}
        libc::close(pidfd);
    }
    Err(raised(py, &io::Error::from_raw_os_error(plan.errno), plan.step.words()))
}

fn raised(_: Python<'_>, error: &io::Error, what: &'static str) -> PyErr {
    PyOSError::new_err((error.raw_os_error().unwrap_or(0), what))
}

/// Make the child, and come back when it has executed its program or given up.
fn cloned(plan: &mut Plan) -> io::Result<(libc::pid_t, c_int)> {
    let mut stack = vec![0u128; STACK_BYTES / size_of::<u128>()];
    let mut pidfd: c_int = -1;
    // A handler of ours must not run in the child, on our memory: all signals wait until it has its own handlers.
    // SAFETY: plain data, filled before it is read; a u128 has the alignment of a stack; the child has the stack for
    // itself, and is done with it and with `plan` when clone() returns, which CLONE_VFORK sees to.
    unsafe {
        let (mut all, mut before): (libc::sigset_t, libc::sigset_t) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
        // Who changes its user is not to be looked into (commit_creds), and its memory is ours: put back what it was.
        let dumpable = libc::prctl(libc::PR_GET_DUMPABLE, NONE, NONE, NONE, NONE);
        let top = stack.as_mut_ptr().add(stack.len()).cast::<c_void>();
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD;
        let argument = ptr::from_mut(plan).cast::<c_void>();
        let pid = libc::clone(child, top, flags, argument, &mut pidfd as *mut c_int);
        let error = io::Error::last_os_error();
        if dumpable == 1 {
            libc::prctl(libc::PR_SET_DUMPABLE, 1 as c_ulong, NONE, NONE, NONE);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, ptr::null_mut());
        if pid < 0 { Err(error) } else { Ok((pid, pidfd)) }
    }
}

/// The child, on a stack of its own and otherwise on our memory.
extern "C" fn child(argument: *mut c_void) -> c_int {
    // SAFETY: `cloned` passes a plan and waits; nobody else looks at it meanwhile.
    let plan = unsafe { &mut *argument.cast::<Plan>() };
    let Err(step) = born(plan) else { return NOT_EXECUTED };
    plan.step = step;
    plan.errno = errno();
    NOT_EXECUTED
}

/// Every step in its order; comes back only if one fails.
fn born(plan: &mut Plan) -> Result<(), Step> {
    own_signals();
    if let Some(procs) = plan.cgroup {
        // SAFETY: two bytes of a constant.
        done(unsafe { libc::write(procs, c"0".as_ptr().cast(), 1) } as c_int, Step::Cgroup)?;
    }
    // SAFETY: numbers.
    done(unsafe { if plan.session { libc::setsid() } else { libc::setpgid(0, 0) } }, Step::Session)?;
    place_descriptors(plan)?;
    for (resource, limit) in &plan.limits {
        // SAFETY: the limit outlives the call.
        done(unsafe { libc::prlimit(0, *resource as _, limit, ptr::null_mut()) }, Step::Limits)?;
    }
    if let Some(nice) = plan.nice {
        // SAFETY: numbers.
        done(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) }, Step::Nice)?;
    }
    own_view(plan)?;
    become_user(plan)?;
    // SAFETY: numbers, and a text that ends with NUL; as the user itself, so that what is not its own is refused.
    unsafe {
        libc::umask(plan.umask as libc::mode_t);
        done(libc::chdir(plan.directory.as_ptr()), Step::Directory)?;
        if plan.no_new_privileges {
            done(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1 as c_ulong, NONE, NONE, NONE), Step::Privileges)?;
        }
        if plan.die_with_parent {
            // After the change of user, which forgets it (commit_creds).
            done(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as c_ulong), Step::Parent)?;
            if libc::getppid() != plan.parent {
                libc::_exit(NOT_EXECUTED);
            }
        }
    }
    write_own_pid(plan.listen_pid);
    // SAFETY: both lists end with NULL, and their texts with NUL; `spawn` keeps them.
    done(unsafe { libc::execve(plan.program.as_ptr(), plan.argv.as_ptr(), plan.environment.as_ptr()) }, Step::Execute)
        .map(drop)
}

/// Default actions and an empty mask: Python ignores SIGPIPE, and what is ignored stays so across execve().
///
/// By the system call itself: glibc's sigaction() refuses 32 and 33, its own, which whoever started us may have ignored.
fn own_signals() {
    // The kernel's struct sigaction is of 4 words at most, a mask of 8 bytes among them; all 0 is SIG_DFL.
    let standard = [0_u64; 4];
    // SAFETY: plain data that outlives the calls; without CLONE_SIGHAND the child's handlers are its own.
    unsafe {
        for signal in 1..=64 as c_long {
            libc::syscall(libc::SYS_rt_sigaction, signal, standard.as_ptr(), ptr::null_mut::<u64>(), 8 as c_long);
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::pthread_sigmask(libc::SIG_SETMASK, &none, ptr::null_mut());
    }
}

/// The given descriptors become 0, 1, 2, ...; all others are closed.
fn place_descriptors(plan: &mut Plan) -> Result<(), Step> {
    let count = plan.descriptors.len() as c_int;
    // SAFETY: descriptors of the child's own table.
    unsafe {
        // First out of the way of the places that they get.
        for (moved, given) in plan.moved.iter_mut().zip(&plan.descriptors) {
            *moved = done(libc::fcntl(*given, libc::F_DUPFD_CLOEXEC, count), Step::Descriptors)?;
        }
        for (place, moved) in plan.moved.iter().enumerate() {
            done(libc::dup3(*moved, place as c_int, 0), Step::Descriptors)?;
        }
        // Before 5.9 there is no such call; what Python opens is close-on-exec in any case (PEP 446).
        libc::syscall(libc::SYS_close_range, c_long::from(count), c_long::from(u32::MAX), 0 as c_long);
    }
    Ok(())
}

/// Namespaces, and in that of mounts a folder for temporary files and a root that cannot be written.
fn own_view(plan: &Plan) -> Result<(), Step> {
    if plan.namespaces == 0 {
        return Ok(());
    }
    // SAFETY: texts that end with NUL, and numbers.
    unsafe {
        done(libc::unshare(plan.namespaces), Step::Namespaces)?;
        if plan.namespaces & libc::CLONE_NEWNS == 0 {
            return Ok(());
        }
        let mount = |from: *const c_char, to: *const c_char, kind: *const c_char, flags, data: *const c_char| {
            done(libc::mount(from, to, kind, flags, data.cast()), Step::Mounts)
        };
        let none = ptr::null();
        mount(none, c"/".as_ptr(), none, libc::MS_REC | libc::MS_PRIVATE, none)?;
        for folder in &plan.writable {
            mount(folder.as_ptr(), folder.as_ptr(), none, libc::MS_BIND | libc::MS_REC, none)?;
        }
        if plan.read_only {
            mount_read_only(c"/".as_ptr(), true)?;
            for folder in &plan.writable {
                mount_read_only(folder.as_ptr(), false)?;
            }
        }
        if plan.private_tmp {
            let (kind, mode) = (c"tmpfs".as_ptr(), c"mode=1777".as_ptr());
            mount(kind, c"/tmp".as_ptr(), kind, libc::MS_NOSUID | libc::MS_NODEV, mode)?;
        }
    }
    Ok(())
}

/// The mount at `path` and all below it (mount_setattr(2), from 5.12). Devices can be written to all the same.
fn mount_read_only(path: *const c_char, read_only: bool) -> Result<(), Step> {
    // struct mount_attr: set, clear, propagation, user namespace.
    let bit = libc::MOUNT_ATTR_RDONLY;
    let attributes: [u64; 4] = if read_only { [bit, 0, 0, 0] } else { [0, bit, 0, 0] };
    // SAFETY: the text ends with NUL; the attributes outlive the call, which is told their size.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            c_long::from(libc::AT_FDCWD),
            path,
            c_long::from(libc::AT_RECURSIVE),
            attributes.as_ptr(),
            size_of_val(&attributes),
        )
    };
    done(answer as c_int, Step::Mounts).map(drop)
}

/// By system calls alone: the C library's functions would change every thread of the parent's (nptl setxid).
fn become_user(plan: &Plan) -> Result<(), Step> {
    let step = Step::User;
    // SAFETY: numbers, and a list with its length.
    unsafe {
        if plan.user.is_some() || plan.group.is_some() {
            done(libc::syscall(libc::SYS_setgroups, plan.groups.len(), plan.groups.as_ptr()) as c_int, step)?;
        }
        if let Some(group) = plan.group {
            done(
                libc::syscall(libc::SYS_setresgid, c_long::from(group), c_long::from(group), c_long::from(group))
                    as c_int,
                step,
            )?;
        }
        if let Some(user) = plan.user {
            done(
                libc::syscall(libc::SYS_setresuid, c_long::from(user), c_long::from(user), c_long::from(user)) as c_int,
                step,
            )?;
        }
    }
    Ok(())
}

/// In decimal, ending where it ends: zeros before it would be an octal number to libsystemd (parse_pid).
fn write_own_pid(place: *mut u8) {
    if place.is_null() {
        return;
    }
    let mut digits = [0; PID_DIGITS];
    let mut first = PID_DIGITS;
    // SAFETY: it only answers.
    let mut pid = unsafe { libc::getpid() };
    while pid > 0 && first > 0 {
        first -= 1;
        digits[first] = b'0' + (pid % 10) as u8;
        pid /= 10;
    }
    // SAFETY: `spawn` has found room for so many digits and a NUL there.
    unsafe {
        ptr::copy_nonoverlapping(digits.as_ptr().add(first), place, PID_DIGITS - first);
        *place.add(PID_DIGITS - first) = 0;
    }
}

fn done(answer: c_int, step: Step) -> Result<c_int, Step> {
    if answer < 0 { Err(step) } else { Ok(answer) }
}

fn errno() -> c_int {
    io::Error::last_os_error().raw_os_error().unwrap_or(0)
}
