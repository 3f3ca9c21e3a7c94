//! A ledger in a file: one JSON object per line and connection, appended by a thread of its own a few times a second.
//!
//! Decides the form of an entry, how much may wait, and that a full disk costs whole lines: each worker fills a place of
//! its own, and one thread writes them all, so that what a short write has begun is finished before anything else is
//! written. Knows nothing of why connections end.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fourtuple_engine::broker::ledger::{Ended, Ledger, Passed};

/// How old an entry may be before it is in the file.
const FLUSH_EVERY: Duration = Duration::from_millis(100);
/// What may wait while the disk does not keep up; entries beyond it are lost, and the next one says how many.
const MOST_WAITING_BYTES: usize = 4 << 20;

/// Appends one worker's entries to a file. Dropped, it writes what is left.
#[derive(Debug)]
pub struct LedgerFile {
    shared: Arc<Shared>,
    worker: usize,
    /// Keep one entry in so many.
    every: u32,
    passed: u32,
    /// Entries of what happens before the end, too.
    steps: bool,
}

#[derive(Debug)]
struct Shared {
    /// By worker.
    waiting: Vec<Mutex<String>>,
    /// Entries, since the last one in the file that says so.
    lost: AtomicU64,
    output: Mutex<Output>,
}

#[derive(Debug)]
struct Output {
    file: File,
    /// What is left of a line that the disk had no room for.
    rest: Vec<u8>,
}

impl LedgerFile {
    /// Append to the file at `path`, one entry in `every`; one ledger for each of so many workers.
    /// With `steps`, entries also of how far connections have come, and every entry says which it is.
    pub fn append(path: &Path, every: u32, steps: bool, workers: usize) -> io::Result<Vec<LedgerFile>> {
        let file = OpenOptions::new().append(true).create(true).open(path)?;
        let waiting = (0..workers).map(|_| Mutex::default()).collect();
        let shared = Arc::new(Shared {
            waiting,
            lost: AtomicU64::new(0),
            output: Mutex::new(Output { file, rest: Vec::new() }),
        });
        let writer = Arc::downgrade(&shared);
        std::thread::Builder::new().name("fourtuple-ledger".into()).spawn(move || {
            while let Some(shared) = writer.upgrade() {
                shared.flush();
                drop(shared);
                std::thread::sleep(FLUSH_EVERY);
            }
        })?;
        let every = every.max(1);
        let ledger = |worker| LedgerFile { shared: Arc::clone(&shared), worker, every, passed: 0, steps };
        Ok((0..workers).map(ledger).collect())
    }
}

impl LedgerFile {
    fn write(&self, entry: impl FnOnce(&mut String, Duration) -> std::fmt::Result) {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let Shared { waiting, lost, .. } = self.shared.as_ref();
        let mut waiting = locked(&waiting[self.worker]);
        if waiting.len() >= MOST_WAITING_BYTES {
            lost.fetch_add(1, Relaxed);
            return;
        }
        // Writing to a string cannot fail.
        let _ = entry(&mut waiting, time);
    }
}

impl Ledger for LedgerFile {
    fn ended(&mut self, entry: &Ended<'_>) {
        self.passed += 1;
        if self.passed < self.every {
            return;
        }
        self.passed = 0;
        self.write(|text, time| write_entry(text, entry, self.steps, time));
    }

    fn passed(&mut self, entry: &Passed<'_>) {
        if self.steps {
            self.write(|text, time| write_step(text, entry, time));
        }
    }
}

impl Drop for LedgerFile {
    fn drop(&mut self) {
        self.shared.flush();
    }
}

impl Shared {
    fn flush(&self) {
        let mut output = locked(&self.output);
        let mut text = std::mem::take(&mut output.rest);
        let begun = text.len();
        for waiting in &self.waiting {
            let mut waiting = locked(waiting);
            text.extend_from_slice(waiting.as_bytes());
            waiting.clear();
        }
        let owed = self.lost.load(Relaxed);
        if owed > 0 && text.len() > begun {
            let end = begun + line_end(&text[begun..]) - "}\n".len();
            text.splice(end..end, format!(r#","lost_before":{owed}"#).into_bytes());
        }
        let written = write_some(&mut output.file, &text);
        if written > begun {
            self.lost.fetch_sub(owed, Relaxed);
        }
        let is_torn = if written == 0 { begun > 0 } else { text[written - 1] != b'\n' };
        let torn = if is_torn { line_end(&text[written..]) } else { 0 };
        let lost = text[written + torn..].iter().filter(|&&byte| byte == b'\n').count();
        output.rest = text[written..written + torn].to_vec();
        self.lost.fetch_add(lost as u64, Relaxed);
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How much of it was written before the file took no more.
fn write_some(file: &mut impl Write, text: &[u8]) -> usize {
    let mut written = 0;
    while written < text.len() {
        match file.write(&text[written..]) {
            Ok(0) => break,
            Ok(count) => written += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    written
}

/// Where the first line ends.
fn line_end(text: &[u8]) -> usize {
    text.iter().position(|&byte| byte == b'\n').map_or(text.len(), |end| end + 1)
}

fn write_step(text: &mut String, entry: &Passed<'_>, time: Duration) -> std::fmt::Result {
    write_beginning(text, time, entry.id, Some(entry.how_far.name()), entry.peer, entry.service)?;
    text.push_str("}\n");
    Ok(())
}

fn write_beginning(
    text: &mut String,
    time: Duration,
    id: u64,
    event: Option<&str>,
    peer: Option<SocketAddr>,
    service: &str,
) -> std::fmt::Result {
    let quoted = serde_json::Value::from(service);
    write!(text, r#"{{"time":{}.{:06},"id":"{id:016x}""#, time.as_secs(), time.subsec_micros())?;
    if let Some(event) = event {
        write!(text, r#","event":"{event}""#)?;
    }
    match peer {
        Some(peer) => write!(text, r#","peer":"{peer}""#)?,
        None => text.push_str(r#","peer":null"#),
    }
    write!(text, r#","service":{quoted}"#)
}

fn write_entry(text: &mut String, entry: &Ended<'_>, steps: bool, time: Duration) -> std::fmt::Result {
    let took = entry.ended.since(entry.accepted);
    write_beginning(text, time, entry.id, steps.then_some("ended"), entry.peer, entry.service)?;
    write!(text, r#","reason":"{}""#, entry.reason.name())?;
    write!(text, r#","took_ms":{}.{:03}"#, took.as_millis(), took.subsec_micros() % 1000)?;
    write!(text, r#","bytes_up":{},"bytes_down":{}"#, entry.bytes_up, entry.bytes_down)?;
    text.push_str("}\n");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use fourtuple_engine::Instant;
    use fourtuple_engine::broker::ledger::Reason;

    #[test]
    fn entries_are_lines_of_json_and_sampled() {
        let folder = crate::Folder::new();
        let path = folder.path().join("log");
        let [mut ledger] = <[_; 1]>::try_from(LedgerFile::append(&path, 2, false, 1).unwrap()).unwrap();
        let entry = Ended {
            id: 0x18a9,
            peer: Some("[2001:db8::1]:7".parse().unwrap()),
            service: "a\"b",
            reason: Reason::HandedOff,
            accepted: Instant(1_000_000),
            ended: Instant(3_250_000),
            bytes_up: 1,
            bytes_down: 2,
        };
        (0..4).for_each(|_| ledger.ended(&entry));
        drop(ledger);
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), 2);
        for line in text.lines() {
            let value: serde_json::Value = serde_json::from_str(line).unwrap();
            assert_eq!(value["id"], "00000000000018a9");
            assert_eq!((&value["peer"], &value["service"]), (&"[2001:db8::1]:7".into(), &"a\"b".into()));
            assert_eq!((&value["reason"], &value["took_ms"]), (&"handed_off".into(), &2.25.into()));
        }
    }
}
