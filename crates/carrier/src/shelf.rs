//! Descriptors that the outside has laid ready for a worker: cores name them by number, carriers take them.
//!
//! Decides who closes what nobody took: the last holder of the shelf. Knows no core and no carrier.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fourtuple_engine::{Errno, Given};

use crate::sys::errno_of;

/// A place per descriptor; shared by a worker's thread and whoever orders it about.
#[derive(Clone, Debug, Default)]
pub struct Shelf(Arc<Mutex<Vec<Option<OwnedFd>>>>);

impl Shelf {
    /// Lay a descriptor ready; returns its name.
    pub fn put(&self, descriptor: OwnedFd) -> Given {
        let mut places = self.places();
        let place = places.iter().position(Option::is_none).unwrap_or_else(|| {
            places.push(None);
            places.len() - 1
        });
        places[place] = Some(descriptor);
        Given(place as u32)
    }

    /// A copy of it, which stays where it is: whoever adopts a listener may do so again.
    pub(crate) fn lend(&self, given: Given) -> Result<OwnedFd, Errno> {
        let places = self.places();
        let descriptor = places.get(given.0 as usize).and_then(Option::as_ref).ok_or(Errno(libc::EBADF))?;
        descriptor.try_clone().map_err(|error| errno_of(&error))
    }

    /// Forget it.
    pub(crate) fn discard(&self, given: Given) {
        if let Some(place) = self.places().get_mut(given.0 as usize) {
            *place = None;
        }
    }

    /// Forget all: the worker has ended.
    pub(crate) fn clear(&self) {
        self.places().clear();
    }

    fn places(&self) -> MutexGuard<'_, Vec<Option<OwnedFd>>> {
        // Nothing that can panic runs under this lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
