//! Memory for bytes on their way: fixed-size buffers in chunks that never move, owned by value.
//!
//! Decides who may write where. Knows nothing of rings or sockets. A [`Buf`] is a move-only ticket for one buffer, so a
//! buffer cannot be used twice or freed twice; a lost one is a bug of ours that `in_use` shows at the end.
//!
//! Budget: `buffer_bytes` each, touched on first use only (chunks are zero pages until then). A carrier holds a few
//! chunks, whatever the number of connections: bytes wait in the kernel, not here.

/// One buffer: the right to its bytes. Not `Clone`: give it to `Command::Send` or to [`Buffers::release`].
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a buffer that is neither sent nor released is lost"]
pub struct Buf {
    /// Place in the pool: chunk times `per_chunk` plus place in the chunk.
    id: u32,
    /// How many of its bytes mean something.
    len: u32,
}

impl Buf {
    /// Place in the pool.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// How many bytes it holds.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// The pool. `send` buffers come from its free list; carriers may set whole chunks apart for the kernel to fill.
#[derive(Debug)]
pub struct Buffers {
    chunks: Vec<Box<[u8]>>,
    buffer_bytes: usize,
    per_chunk: u32,
    /// Most chunks that the free list may grow by itself.
    most_free_chunks: u32,
    free_chunks: u32,
    free: Vec<u32>,
    /// Buffers out there by value: taken and neither released nor recycled.
    in_use: usize,
    /// Chunks set apart: their buffers go back to the carrier (`reclaimed`), not to the free list.
    apart: Vec<bool>,
    reclaimed: Vec<u32>,
}

impl Buffers {
    /// A pool of buffers of `buffer_bytes`, `per_chunk` to a chunk; for sending at most `most_free_chunks` chunks.
    pub fn new(buffer_bytes: usize, per_chunk: u32, most_free_chunks: u32) -> Buffers {
        assert!(buffer_bytes > 0 && per_chunk > 0, "a pool of nothing is a bug of ours");
        Buffers {
            chunks: Vec::new(),
            buffer_bytes,
            per_chunk,
            most_free_chunks,
            free_chunks: 0,
            free: Vec::new(),
            in_use: 0,
            apart: Vec::new(),
            reclaimed: Vec::new(),
        }
    }

    /// Bytes in each buffer.
    pub fn buffer_bytes(&self) -> usize {
        self.buffer_bytes
    }

    /// Buffers in each chunk.
    pub fn per_chunk(&self) -> u32 {
        self.per_chunk
    }

    /// Buffers held by a core or by a command; zero when every connection is closed.
    pub fn in_use(&self) -> usize {
        self.in_use
    }

    /// A buffer holding a copy of `bytes`, or `None` when the pool is at its bound: try again after a `Sent`.
    /// `bytes` longer than a buffer is a bug of ours.
    pub fn write(&mut self, bytes: &[u8]) -> Option<Buf> {
        assert!(bytes.len() <= self.buffer_bytes, "the caller cuts to buffer_bytes()");
        let mut buf = self.take()?;
        let place = self.place(buf.id);
        self.chunks[place.0][place.1..place.1 + bytes.len()].copy_from_slice(bytes);
        buf.len = bytes.len() as u32;
        Some(buf)
    }

    /// An empty buffer for a carrier to read into, or `None` at the bound.
    pub fn take(&mut self) -> Option<Buf> {
        if self.free.is_empty() {
            if self.free_chunks == self.most_free_chunks {
                return None;
            }
            self.free_chunks += 1;
            let first = self.add_chunk(false);
            self.free.extend((first..first + self.per_chunk).rev());
        }
        self.in_use += 1;
        self.free.pop().map(|id| Buf { id, len: 0 })
    }

    /// The bytes that the buffer holds.
    pub fn bytes(&self, buf: &Buf) -> &[u8] {
        let (chunk, start) = self.place(buf.id);
        &self.chunks[chunk][start..start + buf.len as usize]
    }

    /// The whole memory of a buffer, to be filled; say how much with [`Buffers::set_len`].
    pub fn memory(&mut self, buf: &Buf) -> &mut [u8] {
        let (chunk, start) = self.place(buf.id);
        &mut self.chunks[chunk][start..start + self.buffer_bytes]
    }

    /// Say how many bytes of the buffer mean something.
    pub fn set_len(&mut self, buf: &mut Buf, len: usize) {
        assert!(len <= self.buffer_bytes, "more bytes than the buffer has");
        buf.len = len as u32;
    }

    /// Give the buffer back.
    pub fn release(&mut self, buf: Buf) {
        self.in_use -= 1;
        if self.apart[(buf.id / self.per_chunk) as usize] {
            self.reclaimed.push(buf.id);
        } else {
            self.free.push(buf.id);
        }
    }

    /// For carriers: a chunk set apart for the kernel to fill; returns the id of its first buffer. Its memory never moves.
    pub fn set_apart(&mut self) -> u32 {
        self.add_chunk(true)
    }

    /// For carriers: address of a chunk's memory, by the id of its first buffer.
    pub fn chunk_memory(&mut self, first: u32) -> &mut [u8] {
        let chunk = (first / self.per_chunk) as usize;
        &mut self.chunks[chunk]
    }

    /// For carriers: the kernel filled buffer `id` of a chunk set apart with `len` bytes.
    pub fn filled(&mut self, id: u32, len: usize) -> Buf {
        assert!(self.apart[(id / self.per_chunk) as usize], "only chunks set apart are filled by the kernel");
        assert!(len <= self.buffer_bytes, "more bytes than the buffer has");
        self.in_use += 1;
        Buf { id, len: len as u32 }
    }

    /// For carriers: ids of released buffers of chunks set apart, to be given to the kernel again.
    pub fn drain_reclaimed(&mut self) -> impl Iterator<Item = u32> + '_ {
        self.reclaimed.drain(..)
    }

    fn add_chunk(&mut self, apart: bool) -> u32 {
        let first = self.chunks.len() as u32 * self.per_chunk;
        self.chunks.push(vec![0; self.buffer_bytes * self.per_chunk as usize].into_boxed_slice());
        self.apart.push(apart);
        first
    }

    fn place(&self, id: u32) -> (usize, usize) {
        ((id / self.per_chunk) as usize, (id % self.per_chunk) as usize * self.buffer_bytes)
    }
}
