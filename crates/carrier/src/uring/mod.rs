//! uring
use crate::sys::Wake;
use crate::worker::{CarrierReport, CarrierSettings};
use fourtuple_engine::{Carrier, CarrierError, Core, Errno, Until};
use std::cell::Cell;
use std::rc::Rc;

/// What of io_uring this process can use, found by trying.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct UringAbilities {
    /// Sockets without descriptors.
    pub direct_descriptors: bool,
    /// accept that repeats.
    pub multishot_accept: bool,
    /// receive that repeats.
    pub multishot_receive: bool,
    /// Socket options on direct descriptors.
    pub setsockopt: bool,
}

/// Try.
pub fn probe_uring() -> Result<UringAbilities, CarrierError> {
    Err(CarrierError { what: "io_uring_setup", error: Errno(38) })
}

/// Connections on direct descriptors.
pub struct Uring {}
impl Uring {
    pub(crate) fn new(_s: CarrierSettings, _w: &Wake, _r: &Rc<Cell<CarrierReport>>) -> Result<Uring, CarrierError> {
        Err(CarrierError { what: "io_uring_setup", error: Errno(38) })
    }
}
impl Carrier for Uring {
    fn capacity(&self) -> u32 {
        0
    }
    fn run(&mut self, _core: &mut dyn Core, _until: &mut dyn Until) -> Result<(), CarrierError> {
        Ok(())
    }
}
