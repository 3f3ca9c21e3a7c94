//! The file under trouble: several writers, writers killed in mid-write, readers that vanish, a full map, other files.

mod support;

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;

use fourtuple_registry::{
    Batch, Error, FORMAT, Format, Mode, Name, Options, Outcome, Rows, Seen, Service, Start, Store, write_row,
};
use support::{Folder, open, put, route, service};

const KILLS: u32 = 200;
const GROUP: u32 = 50;

fn name(text: &str) -> Name {
    Name::parse(text.as_bytes()).unwrap()
}

fn all(store: &Arc<Store>) -> Vec<Service> {
    let mut services = Vec::new();
    store
        .reader()
        .unwrap()
        .services(None, |service| {
            services.push(service);
            true
        })
        .unwrap();
    services
}

#[test]
fn what_was_put_is_there_and_after_it_was_closed() {
    let folder = Folder::new();
    let wide = Service { wide_port: Some(90_000), ..service("b", "tcp:[::1]:80") };
    let store = folder.store();
    let counts = put(&store, Mode::Add, &[wide.clone(), service("a", "unix:/a")]).unwrap();
    assert_eq!((counts.added, counts.replaced), (2, 0));
    store.add_routes(&[route(&[("name", "**")], "service:b")], false).unwrap();
    drop(store);
    let store = folder.store();
    assert_eq!(all(&store), [service("a", "unix:/a"), wide.clone()]);
    assert_eq!(store.reader().unwrap().by_wide_port(90_000).unwrap(), Some(wide));
    assert_eq!(store.remove(&[name("b"), name("c")]).unwrap(), ["c"]);
    assert_eq!(store.reader().unwrap().by_wide_port(90_000).unwrap(), None);
    let sizes = store.reader().unwrap().sizes().unwrap();
    assert_eq!((sizes.services, sizes.wide_ports, sizes.routes), (1, 0, 1));
}

/// An empty file that has no name any more.
fn nameless(folder: &Folder) -> File {
    let path = folder.0.join("nameless");
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    file
}

fn sealed(folder: &Folder, services: &[Service]) -> fourtuple_registry::Result<Arc<Store>> {
    let mut batch = Batch::default();
    services.iter().for_each(|service| batch.push(service));
    Store::sealed(nameless(folder), &mut batch, &[route(&[("protocol", "ssh")], "service:a")])
}

#[test]
fn a_sealed_store_holds_what_it_was_made_with_and_has_no_name() {
    let folder = Folder::new();
    let many: Vec<_> = (0..10_000).map(|number| service(&format!("s{number:05}"), "unix:/s")).collect();
    // Two at once, as two brokers of one process have them.
    let one = sealed(&folder, &[service("a", "unix:/one")]).unwrap();
    let two = sealed(&folder, &[many.as_slice(), &[service("a", "unix:/two")]].concat()).unwrap();
    assert_eq!(std::fs::read_dir(&folder.0).unwrap().count(), 0);
    assert_eq!(all(&one), [service("a", "unix:/one")]);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_eq!(all(&two).len(), many.len() + 1));
        }
    });
    let seen = Seen { protocol: Some("ssh"), ..Seen::default() };
    let Ok(Outcome::Found(found)) = two.reader().unwrap().resolve(&seen) else { panic!("the route is there") };
    assert_eq!(found.target.to_string(), "unix:/two");
    let version = two.version();
    for refused in [
        put(&two, Mode::Set, &[service("b", "unix:/b")]).map(|_| ()),
        two.remove(&[name("a")]).map(|_| ()),
        two.add_routes(&[route(&[("name", "**")], "service:a")], false),
    ] {
        assert!(refused.unwrap_err().to_string().contains("sealed"));
    }
    assert_eq!(two.version(), version);
    assert!(sealed(&folder, &[service("a", "unix:/a"), service("a", "unix:/b")]).is_err());
    assert!(sealed(&folder, &[service("b", "unix:/a")]).is_err(), "its route leads nowhere");
}

#[test]
fn modes_and_conflicts_keep_whole_batches() {
    let folder = Folder::new();
    let store = folder.store();
    let wide = |name: &str, port| Service { wide_port: Some(port), ..service(name, "unix:/x") };
    put(&store, Mode::Add, &[wide("a", 1), wide("b", 2)]).unwrap();
    for services in
        [vec![service("n", "unix:/n"), service("a", "unix:/y")], vec![service("c", "unix:/c"), service("c", "unix:/d")]]
    {
        assert!(matches!(put(&store, Mode::Add, &services), Err(Error::Bad { field, .. }) if field == "name"));
    }
    assert!(
        matches!(put(&store, Mode::Set, &[service("n", "unix:/n"), wide("z", 2)]), Err(Error::Bad { field, .. }) if field == "wide_port")
    );
    assert_eq!(all(&store).len(), 2);
    // One batch may exchange wide ports, and of a name twice the last is kept.
    put(&store, Mode::Set, &[wide("a", 2), wide("b", 7), wide("b", 1)]).unwrap();
    assert_eq!(store.reader().unwrap().by_wide_port(1).unwrap().unwrap().name, "b");
    assert_eq!(store.reader().unwrap().by_wide_port(7).unwrap(), None);
}

#[test]
fn a_reader_sees_its_snapshot_and_the_next_one_the_change() {
    let folder = Folder::new();
    let store = folder.store();
    let before = store.reader().unwrap();
    put(&store, Mode::Add, &[service("a", "unix:/a")]).unwrap();
    assert_eq!(before.by_name(&name("a")).unwrap(), None);
    assert!(before.is_stale());
    let after = store.reader().unwrap();
    assert!(!after.is_stale() && after.by_name(&name("a")).unwrap().is_some());
}

#[test]
fn routes_are_checked() {
    let folder = Folder::new();
    let store = folder.store();
    let dangling = route(&[("name", "a")], "service:nobody");
    assert!(matches!(store.add_routes(&[dangling], false), Err(Error::Bad { field, .. }) if field == "to"));
    let one = route(&[("user", "a")], "unix:/a");
    store.add_routes(std::slice::from_ref(&one), false).unwrap();
    assert!(store.add_routes(std::slice::from_ref(&one), false).is_err());
    store.add_routes(&[route(&[("user", "a")], "unix:/b")], true).unwrap();
    let mut to = Vec::new();
    store
        .reader()
        .unwrap()
        .routes(|route| {
            to.push(route.to);
            Ok(true)
        })
        .unwrap();
    assert_eq!(to, ["unix:/b"]);
    assert!(store.remove_route(&one.conditions).unwrap() && !store.remove_route(&one.conditions).unwrap());
}

#[test]
fn an_anchor_holds_a_thousand_routes() {
    let folder = Folder::new();
    let store = folder.store();
    let row = |number: u32| route(&[("name", "a"), ("source_port", &number.to_string())], "unix:/a");
    store.add_routes(&(1..=1_000).map(row).collect::<Vec<_>>(), false).unwrap();
    assert!(
        matches!(store.add_routes(&[row(1_001)], false), Err(Error::Bad { why, .. }) if why.contains("1000 routes"))
    );
    let seen = Seen { name: Some(b"a"), source: Some("10.0.0.1:999".parse().unwrap()), ..Seen::default() };
    assert!(matches!(store.reader().unwrap().resolve(&seen).unwrap(), fourtuple_registry::Outcome::Found(_)));
}

#[test]
fn a_full_map_is_an_error_and_loses_nothing() {
    let folder = Folder::new();
    let store = Store::open(&folder.0, true, Some(1 << 20)).unwrap();
    put(&store, Mode::Add, &[service("first", "unix:/first")]).unwrap();
    let many: Vec<_> = (0..40_000).map(|number| service(&format!("s{number}"), "unix:/run/somewhere")).collect();
    assert!(matches!(put(&store, Mode::Add, &many), Err(Error::Full { most_bytes }) if most_bytes == 1 << 20));
    assert_eq!(all(&store), [service("first", "unix:/first")]);
    put(&store, Mode::Add, &many[..100]).unwrap();
    drop(store);
    // Opened for more, there is more room.
    put(&folder.store(), Mode::Set, &many).unwrap();
}

#[test]
fn other_files_and_newer_formats_are_refused() {
    let folder = Folder::new();
    assert!(matches!(Store::open(&folder.0, false, None), Err(Error::Absent(_))));
    for junk in [vec![7; 100], vec![7; 8_192]] {
        std::fs::write(folder.0.join("data.mdb"), junk).unwrap();
        let refused = Store::open(&folder.0, true, None).err().unwrap();
        assert!(refused.to_string().contains("is no registry"), "{refused}");
    }
    std::fs::remove_file(folder.0.join("data.mdb")).unwrap();
    drop(folder.store());
    // The format's number, in the page where LMDB keeps the table of one row.
    let path = folder.0.join("data.mdb");
    let mut bytes = std::fs::read(&path).unwrap();
    let row = [b"format".as_slice(), &FORMAT.to_be_bytes()].concat();
    let places: Vec<_> = (0..=bytes.len() - row.len()).filter(|at| bytes[*at..].starts_with(&row)).collect();
    assert!(!places.is_empty());
    for at in places {
        bytes[at + 6..at + 10].copy_from_slice(&(FORMAT + 1).to_be_bytes());
    }
    std::fs::write(&path, bytes).unwrap();
    let refused = Store::open(&folder.0, true, None).err().unwrap();
    assert!(refused.to_string().contains("newer"), "{refused}");
}

#[test]
fn lines_in_blocks_of_any_size() {
    let services = [
        Service {
            options: Options {
                patience_ms: Some(5),
                connections: Some(6),
                proxy: Some(1),
                start: Some(Start::checked("start", "app-1").unwrap()),
            },
            ..service("a.b", "unix:/r,\"x")
        },
        Service {
            wide_port: Some(4_000_000_000),
            options: Options { patience_ms: Some(0), ..Options::default() }, // CSV once refused what it had written
            ..service("c", "tcp:[::1]:80")
        },
    ];
    for format in [Format::Csv, Format::JsonLines] {
        let mut text = Vec::new();
        services.iter().for_each(|service| write_row(format, service, &mut text));
        text.pop();
        for size in 1..text.len() {
            let (mut rows, mut read) = (Rows::new(format), Vec::new());
            for block in text.chunks(size) {
                rows.feed(block, |service| {
                    read.push(service);
                    Ok(())
                })
                .unwrap();
            }
            rows.finish(|service| {
                read.push(service);
                Ok(())
            })
            .unwrap();
            assert_eq!(read, services, "{format:?} {size}");
        }
    }
}

#[test]
fn bad_lines_name_line_and_field() {
    for (format, text, wanted) in [
        (Format::Csv, "a,unix:/a\n\nb,unix:b\n", "line 3, target"),
        (Format::Csv, "a b,unix:/a\n", "line 1, name"),
        (Format::Csv, "target,name,speed\n", "line 1, header"),
        (Format::Csv, "target,name\nunix:/a,a,1\n", "line 2, text"),
        (Format::Csv, "a,unix:/a,relay,1,2,3,1,app,9\n", "line 1, text"),
        (Format::Csv, "a,unix:/a,relay,1,2,3,1,../app\n", "line 1, start"),
        (Format::Csv, "a,unix:/a,inetd\n", "line 1, start"),
        (Format::Csv, "a,\"unix:/a\n", "line 1, text"),
        (Format::Csv, "a,unix:/a,relay,0\n", "line 1, wide_port"),
        (Format::Csv, "a,unix:/a,relay,+1\n", "line 1, wide_port"),
        (Format::Csv, "a,tcp:1.2.3.4:5,handoff\n", "line 1, delivery"),
        (Format::Csv, "a,unix:/a,relay,,,,3\n", "line 1, proxy"),
        (Format::JsonLines, "{\"name\":\"a\",\"target\":\"unix:/a\",\"speed\":1}\n", "line 1, JSON"),
        (Format::JsonLines, "{\"name\":\"a\",\"target\":\"unix:/a\"}\n[]\n", "line 2, JSON"),
        (Format::JsonLines, "{\"name\":\"a\\u0000\",\"target\":\"unix:/a\"}\n", "line 1, name"),
        (Format::JsonLines, "{\"name\":\"a\",\"target\":\"unix:/a\",\"wide_port\":-1}\n", "line 1, JSON"),
    ] {
        let error = Rows::new(format).feed(text.as_bytes(), |_| Ok(())).unwrap_err();
        assert!(error.to_string().starts_with(wanted), "{text:?}: {error}");
    }
    let endless = Rows::new(Format::Csv).feed(&[b'a'; 9_000], |_| Ok(())).unwrap_err();
    assert!(endless.to_string().contains("longer than"), "{endless}");
}

/// In a process of its own, for the tests below: what FOURTUPLE_REGISTRY_WORK says, on the store of the second word.
#[test]
fn worker() {
    let Ok(work) = std::env::var("FOURTUPLE_REGISTRY_WORK") else { return };
    let words: Vec<_> = work.split(' ').collect();
    let store = open(Path::new(words[1]));
    match words[0] {
        "generations" => {
            // Each transaction gives every service of the group the same number; it is told when it is on the disk.
            for generation in words[2].parse::<u32>().unwrap()..u32::MAX {
                put(&store, Mode::Set, &generation_of(generation)).unwrap();
                println!("committed {generation}");
            }
        }
        "add" => {
            for number in 0..200 {
                put(&store, Mode::Add, &[service(&format!("{}-{number}", words[2]), "unix:/a")]).unwrap();
            }
        }
        "read" => {
            let _reader = store.reader().unwrap();
            println!("committed 0");
            std::thread::sleep(std::time::Duration::from_secs(600));
        }
        other => panic!("{other}"),
    }
}

fn generation_of(generation: u32) -> Vec<Service> {
    let options = Options { patience_ms: Some(generation), ..Options::default() };
    let named = |number| service(&format!("g{number}-{}", if number % 2 == 0 { generation % 7 } else { 0 }), "unix:/a");
    (0..GROUP)
        .map(|number| Service { options, wide_port: (number % 2 == 1).then_some(number), ..named(number) })
        .collect()
}

struct Worker(Child, BufReader<ChildStdout>);

impl Worker {
    fn start(work: &str) -> Worker {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["worker", "--exact", "--nocapture", "--test-threads=1"])
            .env("FOURTUPLE_REGISTRY_WORK", work)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        Worker(child, out)
    }

    /// The next number that it says is on the disk.
    fn committed(&mut self) -> Option<u32> {
        let mut line = String::new();
        while self.1.read_line(&mut line).unwrap() > 0 {
            // The test harness puts its own words before the first.
            if let Some((_, number)) = line.trim().split_once("committed ") {
                return number.parse().ok();
            }
            line.clear();
        }
        None
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn killed_in_mid_write() {
    let folder = Folder::new();
    let store = folder.store();
    let (mut next, mut in_between) = (1, 0);
    for round in 0..KILLS {
        let mut worker = Worker::start(&format!("generations {} {next}", folder.0.display()));
        let mut last = worker.committed().unwrap();
        for _ in 0..round % 5 {
            last = worker.committed().unwrap();
        }
        // Somewhere in the next transactions.
        std::thread::sleep(std::time::Duration::from_micros(u64::from(round) * 37 % 3_000));
        worker.kill();
        while let Some(later) = worker.committed() {
            last = later;
        }
        let odd: Vec<_> = all(&store).into_iter().filter(|service| service.wide_port.is_some()).collect();
        assert_eq!(odd.len(), (GROUP / 2) as usize);
        let found = odd[0].options.patience_ms.unwrap();
        assert!(found == last || found == last + 1, "{last} was committed, {found} is there");
        in_between += u32::from(found != last);
        let newest: BTreeMap<_, _> =
            generation_of(found).into_iter().map(|service| (service.name.clone(), service)).collect();
        let there: BTreeMap<_, _> = all(&store).into_iter().map(|service| (service.name.clone(), service)).collect();
        for (name, service) in &newest {
            assert_eq!(there.get(name), Some(service), "a torn transaction");
        }
        for number in (1..GROUP).step_by(2) {
            assert_eq!(store.reader().unwrap().by_wide_port(number).unwrap().unwrap().options.patience_ms, Some(found));
        }
        next = found + 1;
    }
    println!("{KILLS} kills, {} generations; {in_between} were on the disk and not yet told", next - 1);
}

#[test]
fn several_writers_at_once() {
    let folder = Folder::new();
    let store = folder.store();
    let mut workers: Vec<_> =
        ["x", "y", "z"].map(|who| Worker::start(&format!("add {} {who}", folder.0.display()))).into();
    for number in 0..200 {
        put(&store, Mode::Add, &[service(&format!("w-{number}"), "unix:/a")]).unwrap();
    }
    for worker in &mut workers {
        assert!(worker.0.wait().unwrap().success());
    }
    assert_eq!(all(&store).len(), 800);
}

#[test]
fn readers_that_vanish_free_their_place() {
    let folder = Folder::new();
    let store = folder.store();
    let mut worker = Worker::start(&format!("read {}", folder.0.display()));
    worker.committed().unwrap();
    assert_eq!(store.clear_stale_readers().unwrap(), 0, "it lives");
    worker.kill();
    assert_eq!(store.clear_stale_readers().unwrap(), 1);
}

#[test]
fn one_process_shares_one_store() {
    let folder = Folder::new();
    let (one, other) = (folder.store(), folder.store());
    assert!(Arc::ptr_eq(&one, &other));
    put(&one, Mode::Add, &[service("a", "unix:/a")]).unwrap();
    drop(one);
    assert_eq!(all(&other).len(), 1);
    let mut batch = Batch::default();
    assert_eq!(batch.commit(&other, Mode::Add).unwrap().added, 0);
    let readers: Vec<_> = (0..10).map(|_| other.reader().unwrap()).collect();
    drop(other);
    assert!(readers.iter().all(|reader| reader.by_name(&name("a")).unwrap().is_some()), "a reader keeps it open");
}
