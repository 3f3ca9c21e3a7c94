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
    /// Nothing was behind these bytes but the end of their stream.
    is_last: bool,
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

    /// Whether nothing was behind these bytes but the end of their stream, when they were received. Whoever sends the
    /// buffer on will send the end, too, and both may go in one segment: a carrier sends it with MSG_MORE.
    pub fn is_last(&self) -> bool {
        self.is_last
    }

    /// Say so.
    pub fn set_last(&mut self) {
        self.is_last = true;
    }
}

/// The pool: one for what is received and what is sent.
#[derive(Debug)]
pub struct Buffers {
    chunks: Vec<Box<[u8]>>,
    buffer_bytes: usize,
    per_chunk: u32,
    most_chunks: usize,
    free: Vec<u32>,
    /// Buffers out there by value: taken and not released.
    in_use: usize,
}

impl Buffers {
    /// A pool of buffers of `buffer_bytes`, `per_chunk` to a chunk, at most `most_chunks` chunks.
    pub fn new(buffer_bytes: usize, per_chunk: u32, most_chunks: u32) -> Buffers {
        assert!(buffer_bytes > 0 && per_chunk > 0, "a pool of nothing is a bug of ours");
        let most_chunks = most_chunks as usize;
        Buffers { chunks: Vec::new(), buffer_bytes, per_chunk, most_chunks, free: Vec::new(), in_use: 0 }
    }

    /// Bytes in each buffer.
    pub fn buffer_bytes(&self) -> usize {
        self.buffer_bytes
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

    /// An empty buffer to write or to read into, or `None` at the bound.
    pub fn take(&mut self) -> Option<Buf> {
        if self.free.is_empty() {
            if self.chunks.len() == self.most_chunks {
                return None;
            }
            let first = self.chunks.len() as u32 * self.per_chunk;
            self.chunks.push(vec![0; self.buffer_bytes * self.per_chunk as usize].into_boxed_slice());
            self.free.extend((first..first + self.per_chunk).rev());
        }
        self.in_use += 1;
        self.free.pop().map(|id| Buf { id, len: 0, is_last: false })
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

    /// Forget the first `count` bytes of the buffer; there are more than that.
    pub fn cut(&mut self, buf: &mut Buf, count: usize) {
        let end = buf.len as usize;
        self.memory(buf).copy_within(count..end, 0);
        buf.len -= count as u32;
    }

    /// Give the buffer back.
    pub fn release(&mut self, buf: Buf) {
        self.in_use -= 1;
        self.free.push(buf.id);
    }

    fn place(&self, id: u32) -> (usize, usize) {
        ((id / self.per_chunk) as usize, (id % self.per_chunk) as usize * self.buffer_bytes)
    }
}
