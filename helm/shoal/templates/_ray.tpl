{{- define "shoal.rayStart" -}}
object-store-memory: {{ int64 .Values.ray.objectStoreBytes | quote }}
{{- end -}}

{{- /* gcsFaultToleranceOptions; empty where there are none. */}}
{{- define "shoal.gcs" -}}
{{- with .Values.ray.gcs }}
{{- if eq .faultTolerance "embedded" -}}
backend: rocksdb
storage:
  size: {{ .size }}
  deletionPolicy: {{ .deletionPolicy }}
  {{- with .storageClass }}
  storageClassName: {{ . }}
  {{- end }}
{{- else if eq .faultTolerance "redis" -}}
redisAddress: {{ .redisAddress }}
{{- with .redisSecret }}
redisPassword:
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: password
{{- end }}
{{- end }}
{{- end }}
{{- end -}}
