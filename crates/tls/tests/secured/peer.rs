//! The other side, in memory: a certificate authority made for the test, and a rustls server that echoes or answers.

use std::io::{Read, Write};
use std::sync::Arc;

use fourtuple_engine::speech::{Part, Speech, Turn, Wrong};
use fourtuple_tls::{Client, Sealed, Secured, Settings};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, date_time_ymd};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection, SupportedProtocolVersion};

pub(crate) const BUFFER_BYTES: usize = 2048;

/// A certificate authority.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    pub(crate) pem: Vec<u8>,
}

/// What a certificate says, and its key.
pub(crate) struct Identity {
    pub(crate) chain: Vec<CertificateDer<'static>>,
    key: KeyPair,
    pub(crate) certificate_pem: Vec<u8>,
    pub(crate) key_pem: Vec<u8>,
}

impl Authority {
    pub(crate) fn new() -> Authority {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("a certificate");
        let pem = certificate.pem().into_bytes();
        Authority { certificate: certificate.der().clone(), issuer: Issuer::new(params, key), pem }
    }

    /// For these names and addresses, valid in these years.
    pub(crate) fn identity(&self, names: &[&str], years: (i32, i32)) -> Identity {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).expect("names");
        (params.not_before, params.not_after) = (date_time_ymd(years.0, 1, 1), date_time_ymd(years.1, 1, 1));
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        Identity {
            chain: vec![certificate.der().clone(), self.certificate.clone()],
            certificate_pem: certificate.pem().into_bytes(),
            key_pem: key.serialize_pem().into_bytes(),
            key,
        }
    }

    pub(crate) fn settings(&self) -> Settings {
        Settings { server_name: "localhost".to_owned(), ca: Some(self.pem.clone()), ..Settings::default() }
    }
}

impl Identity {
    /// A server with this identity that speaks these versions.
    pub(crate) fn server(&self, versions: &[&'static SupportedProtocolVersion]) -> ServerConfig {
        self.server_asking(versions, None)
    }

    /// The same, which asks for a certificate of that authority if there is one.
    pub(crate) fn server_asking(
        &self,
        versions: &[&'static SupportedProtocolVersion],
        authority: Option<&Authority>,
    ) -> ServerConfig {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.serialize_der()));
        let builder =
            ServerConfig::builder_with_provider(provider.clone()).with_protocol_versions(versions).expect("versions");
        let builder = match authority {
            None => builder.with_no_client_auth(),
            Some(authority) => {
                let mut roots = RootCertStore::empty();
                roots.add(authority.certificate.clone()).expect("a root");
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                builder.with_client_cert_verifier(verifier.build().expect("a verifier"))
            }
        };
        builder.with_single_cert(self.chain.clone(), key).expect("an identity")
    }
}

/// A server on one connection.
pub(crate) struct Server {
    pub(crate) tls: ServerConnection,
    /// Plain bytes that came.
    pub(crate) heard: Vec<u8>,
}

impl Server {
    pub(crate) fn new(config: ServerConfig) -> Server {
        Server { tls: ServerConnection::new(Arc::new(config)).expect("a server"), heard: Vec::new() }
    }

    /// Take bytes from the wire. What is wrong with them is in the alert that goes back.
    pub(crate) fn take(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            self.tls.read_tls(&mut bytes).expect("reading memory");
            let Ok(state) = self.tls.process_new_packets() else { return };
            let start = self.heard.len();
            self.heard.resize(start + state.plaintext_bytes_to_read(), 0);
            self.tls.reader().read_exact(&mut self.heard[start..]).expect("as many as there are");
        }
    }

    pub(crate) fn say(&mut self, bytes: &[u8]) {
        self.tls.writer().write_all(bytes).expect("room");
    }

    /// What goes to the wire.
    pub(crate) fn wire(&mut self) -> Vec<u8> {
        let mut out = Vec::new();
        while self.tls.wants_write() {
            self.tls.write_tls(&mut out).expect("writing memory");
        }
        out
    }
}

/// One connection of a secured speech, driven as the load core drives it.
pub(crate) struct Line<S: Speech> {
    pub(crate) speech: Secured<S>,
    pub(crate) memory: Sealed<S::Memory>,
    serial: u64,
}

impl<S: Speech> Line<S> {
    pub(crate) fn new(inner: S, client: &Client) -> Line<S> {
        let mut speech = Secured::new(inner, client.clone());
        speech.fit(BUFFER_BYTES);
        let mut line = Line { speech, memory: Sealed::default(), serial: 7 };
        line.speech.begin(&mut line.memory, Part::Opening);
        line
    }

    /// All that is to be said now.
    pub(crate) fn say_all(&mut self, buffer_bytes: usize) -> Vec<u8> {
        let mut wire = Vec::new();
        let mut buffer = vec![0; buffer_bytes];
        while self.speech.turn(&self.memory) == Turn::Say || self.speech.owes(&self.memory) {
            let length = self.speech.say(&mut self.memory, self.serial, &mut buffer);
            assert!((1..=buffer_bytes).contains(&length), "a turn says something, and no more than fits");
            wire.extend_from_slice(&buffer[..length]);
        }
        wire
    }

    pub(crate) fn hear(&mut self, bytes: &[u8]) -> Result<(), Wrong> {
        let mut rest = bytes;
        while !rest.is_empty() {
            if self.speech.turn(&self.memory) == Turn::Listen {
                let took = self.speech.hear(&mut self.memory, self.serial, rest)?;
                assert!((1..=rest.len()).contains(&took));
                rest = &rest[took..];
            } else {
                self.speech.overhear(&mut self.memory, rest)?;
                rest = &[];
            }
        }
        Ok(())
    }

    pub(crate) fn is_over(&self) -> bool {
        self.speech.turn(&self.memory) == Turn::Over { refused: false }
    }
}
