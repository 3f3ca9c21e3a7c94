//! Services as text, a line each: CSV and JSON lines, in blocks of any size, in and out.
//!
//! Decides the grammar and that an error names line and field. Only ASCII names; Python encodes others before. A line is a
//! row: no field holds a line break, so quoted ones are refused.

use std::borrow::Cow;
use std::io::Write;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use crate::failure::{Error, Result, shown};
use crate::name::Name;
use crate::record::{Delivery, Options, Service, Start};
use crate::route::whole;
use crate::target::Target;

/// The fields of a service, in the order of CSV without a header.
pub const COLUMNS: [&str; 8] =
    ["name", "target", "delivery", "wide_port", "patience_ms", "connections", "proxy", "start"];
const MOST_LINE_BYTES: usize = 8_192;

/// How a line is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// RFC 4180, with a header or in the order of [`COLUMNS`].
    Csv,
    /// An object a line.
    JsonLines,
}

/// Lines become services.
pub struct Rows {
    format: Format,
    /// Which column each field of a line is.
    order: Vec<usize>,
    line: u64,
    rest: Vec<u8>,
}

/// The text of each field; empty is absent.
type Fields<'a> = [Cow<'a, str>; COLUMNS.len()];

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Object<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
    #[serde(borrow)]
    target: Cow<'a, str>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    delivery: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    wide_port: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    patience_ms: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    connections: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    proxy: Option<u8>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    start: Option<Cow<'a, str>>,
}

impl Rows {
    /// Nothing read yet.
    pub fn new(format: Format) -> Rows {
        Rows { format, order: (0..COLUMNS.len()).collect(), line: 0, rest: Vec::new() }
    }

    /// How many lines were read.
    pub fn lines(&self) -> u64 {
        self.line
    }

    /// The next block; `each` is given every service that is whole.
    pub fn feed(&mut self, block: &[u8], mut each: impl FnMut(Service) -> Result<()>) -> Result<()> {
        let Some(first) = block.iter().position(|byte| *byte == b'\n') else {
            self.rest.extend(block);
            return self.short_enough(self.rest.len());
        };
        let (end, mut left) = (&block[..first], &block[first + 1..]);
        if self.rest.is_empty() {
            self.line(end, &mut each)?;
        } else {
            let mut whole = std::mem::take(&mut self.rest);
            whole.extend(end);
            self.line(&whole, &mut each)?;
        }
        while let Some(end) = left.iter().position(|byte| *byte == b'\n') {
            self.line(&left[..end], &mut each)?;
            left = &left[end + 1..];
        }
        self.rest.extend(left);
        self.short_enough(self.rest.len())
    }

    /// The last line may have no end.
    pub fn finish(&mut self, mut each: impl FnMut(Service) -> Result<()>) -> Result<()> {
        let rest = std::mem::take(&mut self.rest);
        if rest.is_empty() { Ok(()) } else { self.line(&rest, &mut each) }
    }

    fn line(&mut self, bytes: &[u8], each: &mut impl FnMut(Service) -> Result<()>) -> Result<()> {
        self.short_enough(bytes.len())?;
        self.line += 1;
        let number = self.line;
        let at = |error: Error| match error {
            Error::Bad { field, why } => Error::bad(format!("line {number}, {field}"), why),
            other => other,
        };
        let bytes = bytes.strip_suffix(b"\r").unwrap_or(bytes);
        let bytes = if number == 1 { bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes) } else { bytes };
        let text = std::str::from_utf8(bytes).map_err(|_| at(Error::bad("text", "is not UTF-8")))?;
        if text.trim().is_empty() {
            return Ok(());
        }
        let service = match self.format {
            Format::Csv => {
                let fields = split(text).map_err(at)?;
                if number == 1
                    && fields.iter().any(|field| field == "name")
                    && fields.iter().any(|field| field == "target")
                {
                    self.order = header(&fields).map_err(at)?;
                    return Ok(());
                }
                self.service(fields)
            }
            Format::JsonLines => from_json(text),
        };
        each(service.map_err(at)?)
    }

    fn service(&self, fields: Vec<Cow<'_, str>>) -> Result<Service> {
        if fields.len() > self.order.len() {
            return Err(Error::bad("text", format!("has {} fields; {} are known", fields.len(), self.order.len())));
        }
        let mut row = Fields::default();
        for (field, column) in fields.into_iter().zip(&self.order) {
            row[*column] = field;
        }
        let [name, target, delivery, wide_port, patience_ms, connections, proxy, start] = row;
        let optional = |field: &str, text: &str, range: RangeInclusive<u32>| {
            if text.is_empty() { Ok(None) } else { whole(field, text, range).map(Some) }
        };
        Service {
            name: ascii_name(&name)?,
            target: Target::checked("target", &target)?,
            delivery: if delivery.is_empty() { Delivery::default() } else { Delivery::checked("delivery", &delivery)? },
            wide_port: optional("wide_port", &wide_port, 1..=u32::MAX)?,
            options: Options {
                patience_ms: optional("patience_ms", &patience_ms, 0..=u32::MAX)?,
                connections: optional("connections", &connections, 1..=u32::MAX)?,
                proxy: optional("proxy", &proxy, 1..=2)?.map(|version| version as u8),
                start: if start.is_empty() { None } else { Some(Start::checked("start", &start)?) },
            },
        }
        .checked()
    }

    fn short_enough(&self, bytes: usize) -> Result<()> {
        if bytes <= MOST_LINE_BYTES {
            return Ok(());
        }
        Err(Error::bad(format!("line {}", self.line + 1), format!("is longer than {MOST_LINE_BYTES} bytes")))
    }
}

/// Append a line.
pub fn write(format: Format, service: &Service, out: &mut Vec<u8>) {
    let Options { patience_ms, connections, proxy, start } = &service.options;
    match format {
        Format::JsonLines => {
            let object = Object {
                name: Cow::Borrowed(&service.name),
                target: Cow::Owned(service.target.to_string()),
                delivery: Some(Cow::Borrowed(service.delivery.name())),
                wide_port: service.wide_port,
                patience_ms: *patience_ms,
                connections: *connections,
                proxy: *proxy,
                start: start.as_ref().map(|start| Cow::Borrowed(start.as_str())),
            };
            // Neither can fail: there are no maps with odd keys, and a Vec takes everything.
            let _ = serde_json::to_writer(&mut *out, &object);
        }
        Format::Csv => {
            let target = service.target.to_string();
            let quoted = target.contains([',', '"']) || target.trim() != target;
            let target = if quoted { format!("\"{}\"", target.replace('"', "\"\"")) } else { target };
            let _ = write!(out, "{},{target},{}", service.name, service.delivery.name());
            for number in [service.wide_port, *patience_ms, *connections, proxy.map(u32::from)] {
                let _ = match number {
                    Some(number) => write!(out, ",{number}"),
                    None => write!(out, ","),
                };
            }
            let _ = write!(out, ",{}", start.as_ref().map_or("", Start::as_str));
        }
    }
    out.push(b'\n');
}

fn from_json(text: &str) -> Result<Service> {
    let row: Object<'_> = serde_json::from_str(text).map_err(|error| Error::bad("JSON", json_reason(&error)))?;
    Service {
        name: ascii_name(&row.name)?,
        target: Target::checked("target", &row.target)?,
        delivery: row.delivery.map_or(Ok(Delivery::default()), |name| Delivery::checked("delivery", &name))?,
        wide_port: row.wide_port,
        options: Options {
            patience_ms: row.patience_ms,
            connections: row.connections,
            proxy: row.proxy,
            start: row.start.map(|name| Start::checked("start", &name)).transpose()?,
        },
    }
    .checked()
}

/// Without "at line 1", for it always is; the column helps.
fn json_reason(error: &serde_json::Error) -> String {
    shorten(&error.to_string().replace(" at line 1 column", ", at column"))
}

fn shorten(text: &str) -> String {
    text.chars().map(|letter| if letter.is_control() { '?' } else { letter }).take(200).collect()
}

fn ascii_name(text: &str) -> Result<String> {
    Ok(Name::checked("name", text)?.to_string())
}

fn header(fields: &[Cow<'_, str>]) -> Result<Vec<usize>> {
    let mut order = Vec::new();
    for field in fields {
        let known = COLUMNS.iter().position(|column| column == field);
        let column = known.filter(|column| !order.contains(column)).ok_or_else(|| {
            Error::bad("header", format!("{} is not one of {}, each once", shown(field), COLUMNS.join(", ")))
        })?;
        order.push(column);
    }
    Ok(order)
}

/// The fields of a line of CSV (RFC 4180 2).
fn split(line: &str) -> Result<Vec<Cow<'_, str>>> {
    let mut fields = Vec::with_capacity(COLUMNS.len());
    let mut rest = line;
    loop {
        if let Some(quoted) = rest.strip_prefix('"') {
            let mut field = String::new();
            let mut left = quoted;
            rest = loop {
                let (inside, after) = left.split_once('"').ok_or_else(|| Error::bad("text", "has an open quote"))?;
                field.push_str(inside);
                match after.strip_prefix('"') {
                    Some(more) => {
                        field.push('"');
                        left = more;
                    }
                    None => break after,
                }
            };
            fields.push(Cow::Owned(field));
        } else {
            let end = rest.find(',').unwrap_or(rest.len());
            if rest[..end].contains('"') {
                return Err(Error::bad("text", "has a quote inside a field that begins without one"));
            }
            fields.push(Cow::Borrowed(&rest[..end]));
            rest = &rest[end..];
        }
        match rest.strip_prefix(',') {
            Some(more) => rest = more,
            None if rest.is_empty() => return Ok(fields),
            None => return Err(Error::bad("text", "has something behind a quoted field")),
        }
    }
}
