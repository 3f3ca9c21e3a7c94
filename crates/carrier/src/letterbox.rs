//! Where the workers of one process leave their cores' questions, until somebody outside takes them.
//!
//! Decides the bound: what has no room stays with its core. An eventfd is readable while there are some. Knows no question.

use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use fourtuple_engine::{CarrierError, Question, Questions};

use crate::sys::Wake;

/// Questions of the cores' own accord that may lie here.
const MOST: usize = 16_384;

/// The letterbox of one process.
#[derive(Debug)]
pub struct Letterbox {
    waiting: Mutex<Waiting>,
    wake: Wake,
}

#[derive(Debug, Default)]
struct Waiting {
    /// With the worker whose core said it.
    questions: VecDeque<(u32, Question)>,
    own: usize,
}

impl Letterbox {
    /// An empty one.
    pub fn new() -> Result<Letterbox, CarrierError> {
        Ok(Letterbox { waiting: Mutex::default(), wake: Wake::new()? })
    }

    /// Readable while there are questions.
    pub fn fd(&self) -> RawFd {
        self.wake.fd()
    }

    /// The oldest, at most so many, each with the number of its worker.
    pub fn take(&self, most: usize) -> Vec<(u32, Question)> {
        let mut waiting = self.waiting();
        let count = most.min(waiting.questions.len());
        let taken: Vec<(u32, Question)> = waiting.questions.drain(..count).collect();
        waiting.own -= taken.iter().filter(|row| row.1.is_own()).count();
        if waiting.questions.is_empty() {
            // Under the lock, so that the ringing of whoever comes next is not taken back.
            self.wake.silence();
        }
        taken
    }

    /// Put in what has room.
    pub(crate) fn put(&self, worker: u32, questions: &mut Questions) {
        let mut waiting = self.waiting();
        questions.drain(|question| {
            let own = usize::from(question.is_own());
            if waiting.own + own > MOST {
                return Some(question);
            }
            waiting.own += own;
            waiting.questions.push_back((worker, question));
            None
        });
        if !waiting.questions.is_empty() {
            self.wake.ring();
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        // Nothing that can panic runs under this lock.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
